"""A resume notices what changed between two starts under an unchanged command, and a finished model stays as it is."""

import json
import os
import shutil
from hashlib import sha256

import numpy as np
import pytest
from transformers import AutoTokenizer

from ldm.models.provenance import image_keys, in_both, read_trained_images

from .image_folders import noise_image, write_metadata
from .test_entry import train_autoencoder, train_model

WORDS = ("harbour", "lantern", "kettle", "bridge", "violin", "feather", "saddle", "compass", "cushion", "trumpet")
SIZE = ("--data.image_size", 32, "--data.limit", "null", "--data.batch_size", 8, "--data.held_out", "{}")
QUICK = (
    *("--data.source", "imagefolder", "--data.held_out_percent", 10, "--loop.mixed_precision", "no", *SIZE),
    *(
        "--optim.warmup_steps",
        1,
        "--optim.decay",
        "constant",
        "--loop.log_every_steps",
        1,
        "--loop.save_every_steps",
        2,
    ),
    *("--loop.validate_every_steps", 100, "--validation.num_images", 1, "--validation.num_inference_steps", 1),
)


def write_data(folder, count, word="beside"):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        noise_image(rng, 32).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"a {WORDS[index % 10]} {word} a {WORDS[index * 7 % 9]}"})
    write_metadata(folder, rows)


class Place:
    """A folder with data, an autoencoder trained on them and a stage trained to step 4."""

    def __init__(self, folder):
        self.folder = folder

    def autoencoder(self, patch, steps):
        more = ("--data.path", self.folder / "data", *QUICK, "--loop.max_train_steps", steps)
        return train_autoencoder(patch, self.folder / "vae", *more)

    def stage(self, patch, steps, *more):
        more = ("--data.path", self.folder / "data", *QUICK, "--loop.max_train_steps", steps, *more)
        return train_model(patch, self.folder / "stage", self.folder / "vae" / "model", *more)

    def refused(self, patch, capsys, steps, *more):
        """Return what is said of a command that ends with exit code 2."""
        with pytest.raises(SystemExit) as ended:
            self.stage(patch, steps, *more)
        assert ended.value.code == 2
        return capsys.readouterr().err

    def contents(self):
        files = [path for path in (self.folder / "stage").rglob("*") if path.is_file()]
        kept = [path for path in files if path.name in ("config.yaml", "metrics.jsonl") or "model" in path.parts]
        return {str(path): (sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in kept}

    def token_ids(self, text):
        return AutoTokenizer.from_pretrained(self.folder / "stage" / "model" / "tokenizer")(text).input_ids


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("trained"))
    write_data(place.folder / "data", 40)
    with pytest.MonkeyPatch.context() as patch:
        place.autoencoder(patch, 2)
        place.stage(patch, 4)
    return place


@pytest.fixture
def place(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "place")
    return Place(tmp_path / "place")


ALLOWED = ("--allow_config_change", "true")


def test_r25_a_finished_model_stays_as_it_is_whatever_changed(place, monkeypatch, capsys, caplog):
    before = place.contents()
    write_data(place.folder / "data", 40, "next to")
    assert "captions: '" in place.refused(monkeypatch, capsys, 4)
    caplog.set_level("INFO")
    place.stage(monkeypatch, 4, *ALLOWED)
    assert "nothing to train" in caplog.text
    assert "is finished and stays as it is" in caplog.text
    assert place.contents() == before


def test_a_model_folder_that_was_deleted_or_cut_short_is_written_again(place, monkeypatch):
    model, weights = place.folder / "stage" / "model", {}
    for damage in (lambda: shutil.rmtree(model), (model / "README.md").unlink):
        weights[damage] = (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        damage()
        place.stage(monkeypatch, 4)
        assert (model / "README.md").is_file()
        assert (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights[damage]


def test_r25_corrected_captions_are_refused_midway_and_where_allowed_the_tokenizer_stays_the_checkpoints(
    place, monkeypatch, capsys
):
    texts = ["a harbour beside a kettle", "next to a violin"]
    ids = [place.token_ids(text) for text in texts]
    write_data(place.folder / "data", 40, "next to")
    said = place.refused(monkeypatch, capsys, 6)
    assert "captions: '" in said
    assert "tokenizer" not in said, "it is the checkpoint's, and not learned again"
    place.stage(monkeypatch, 6, *ALLOWED)
    assert [place.token_ids(text) for text in texts] == ids


def test_r25_an_autoencoder_that_was_trained_on_under_the_same_path_is_refused(place, monkeypatch, capsys):
    before = place.contents()
    place.autoencoder(monkeypatch, 4)
    for steps in (4, 6):
        assert "networks.space: 'latent-" in place.refused(monkeypatch, capsys, steps)
    assert place.contents() == before


def test_r25_a_grown_data_set_needs_leave_and_then_trains_with_the_autoencoder_of_before(place, monkeypatch, capsys):
    """Split by hash: images that are new in the held-out part were trained on by nobody."""
    held_out_before = json.loads((place.folder / "vae" / "model" / "training.json").read_text())["held_out_hash"]
    write_data(place.folder / "data", 60)
    said = place.refused(monkeypatch, capsys, 6)
    assert "pictures.fingerprint" in said
    model = place.stage(monkeypatch, 6, *ALLOWED)
    record = json.loads((model / "training.json").read_text())
    assert record["held_out_hash"] != held_out_before
    trained = read_trained_images(model)
    assert len(trained) == record["train_pictures"]
    assert len(in_both(trained, image_keys(["none of them"]))) == 0


def test_r25_other_images_held_out_than_before_are_said_by_their_number(place, monkeypatch, capsys):
    said = place.refused(monkeypatch, capsys, 6, "--data.held_out_percent", 30)
    assert "images that are held out here, so it cannot be measured on them" in said


def test_r25_the_same_bytes_elsewhere_are_the_same_data_and_networks(place, monkeypatch, caplog):
    moved = place.folder / "moved"
    shutil.copytree(place.folder / "data", moved)
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    shutil.copytree(place.folder / "vae" / "model", place.folder / "elsewhere")
    place.stage(monkeypatch, 6, "--data.path", moved, "--space.autoencoder", place.folder / "elsewhere")
    assert "resumed step-4 at step 4" in caplog.text or (place.folder / "stage/checkpoints/step-6").is_dir()
