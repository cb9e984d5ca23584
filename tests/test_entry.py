"""The two commands on the tiny configs: in this process, killed and resumed, and as a user launches them."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_text2img
import train_vae
from ldm.commands.sample import sample
from ldm.models.provenance import TRAINED_IMAGES, read_provenance

from .conftest import CORES

ROOT = Path(__file__).parent.parent


def call(main, monkeypatch, *arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments), "--loop.trackers", "[]"])
    main()
    torch.set_num_threads(1)


def train_autoencoder(monkeypatch, folder, *more):
    call(train_vae.main, monkeypatch, "--config", "configs/tiny/vae.yaml", "--output_dir", folder, *more)
    return folder / "model"


def train_model(monkeypatch, folder, vae, *more):
    arguments = ["--config", "configs/tiny/text2img.yaml", "--output_dir", folder, "--space.autoencoder", vae]
    call(train_text2img.main, monkeypatch, *arguments, *more)
    return folder / "model"


EVERY_STEP = ("--loop.log_every_steps", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("entry")


@pytest.fixture(scope="module")
def vae(folder):
    with pytest.MonkeyPatch.context() as patch:
        return train_autoencoder(patch, folder / "vae", *EVERY_STEP)


@pytest.fixture(scope="module")
def model(folder, vae):
    with pytest.MonkeyPatch.context() as patch:
        return train_model(patch, folder / "text2img", vae, *EVERY_STEP)


@pytest.mark.parametrize(
    ("which", "loss", "held_out", "better"),
    [("vae", "loss/autoencoder", "validation/psnr", 1), ("model", "loss/denoiser", "validation/loss", -1)],
)
def test_training_helps_on_its_own_images_and_on_held_out_ones(which, loss, held_out, better, request):
    file = request.getfixturevalue(which).parent / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    losses, measured = ([row[key] for row in rows if key in row] for key in (loss, held_out))
    assert sum(losses[20:]) < 0.95 * sum(losses[:20])
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0], "the first is that of a denoiser that answers 0 to everything"
    assert better * (measured[-1] - measured[0]) > 0


def test_a_run_leaves_what_people_look_for(model, vae):
    assert {"config.yaml", "metrics.jsonl", "model", "checkpoints", "samples"} <= {
        p.name for p in model.parent.iterdir()
    }
    assert len(list((model.parent / "checkpoints").iterdir())) == 2
    assert Image.open(sorted((model.parent / "samples").iterdir())[-1]).width > 100
    assert read_provenance(model).held_out_hash == read_provenance(vae).held_out_hash
    assert json.loads((vae / "config.json").read_text())["scaling_factor"] == 1.0


OTHERS = ("--data.held_out", "{}", "--data.held_out_percent", 30)
"""Other images held out than the lists of the tiny configs hold out."""


def refused(train, monkeypatch, capsys, folder, *arguments):
    """Return what a training says that is refused before anything is built."""
    for build in ("diffusion.build_stage", "autoencoder.build_network"):
        monkeypatch.setattr(f"ldm.recipes.{build}", None)  # it cannot be called
    with pytest.raises(SystemExit) as ended:
        train(monkeypatch, folder, *arguments)
    assert ended.value.code == 2
    assert not (folder / "metrics.jsonl").exists()
    return capsys.readouterr().err


def test_an_autoencoder_that_was_trained_on_held_out_images_is_refused(vae, tmp_path, monkeypatch, capsys):
    leak = re.compile(r"was trained on \d+ of the \d+ images that are held out here")
    assert leak.search(refused(train_model, monkeypatch, capsys, tmp_path / "stage", vae, *OTHERS))
    further = ("--autoencoder", f"{{pretrained: {vae}}}")
    assert leak.search(refused(train_autoencoder, monkeypatch, capsys, tmp_path / "vae", *further, *OTHERS))


@pytest.mark.parametrize("part", ["denoiser", "text", "vae of a pipeline"])
def test_any_pretrained_part_of_an_earlier_version_with_other_images_held_out_is_refused(
    part, model, tmp_path, monkeypatch, capsys
):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    record = json.loads((other / "training.json").read_text())
    (other / "training.json").write_text(json.dumps(record | {"held_out_hash": "0" * 32}))
    (other / TRAINED_IMAGES).unlink()
    more = {
        "denoiser": ["--denoiser", f"{{_class_name: UNet2DConditionModel, pretrained: {other}, subfolder: unet}}"],
        "text": ["--conditioners.text.pretrained", other, "--conditioners.text.encoder", "{}"],
        "vae of a pipeline": [],
    }
    vae = other / "vae" if part == "vae of a pipeline" else model / "vae"
    said = refused(train_model, monkeypatch, capsys, tmp_path / "out", vae, *more[part])
    assert "other images held out" in said


def test_a_learned_variance_trains_and_samples(vae, tmp_path, monkeypatch):
    objective = "{path: scaled_linear, prediction_type: epsilon, variational_weight: 1.0}"
    more = ["--objective", objective, "--denoiser.out_channels", "8", "--loop.max_train_steps", "8"]
    model = train_model(monkeypatch, tmp_path, vae, *more)
    (last_layer,) = (load_file(path)["conv_out.weight"] for path in (model / "unet").glob("*.safetensors"))
    assert (last_layer.flatten(1).abs().amax(1) > 0).tolist() == [True] * 8, "zeros at first: mean and variance learn"
    (path,) = sample(["a cat"], str(model), str(tmp_path), num_inference_steps=2, trust_remote_code=True)
    assert Image.open(path).size == (32, 32)


def test_samples_carry_their_settings_and_repeat(model, tmp_path):
    for folder in ("a", "b"):
        paths = sample(["a red / cat"], str(model), str(tmp_path / folder), num_inference_steps=2, seed=5)
    one, two = (Image.open(tmp_path / folder / paths[0].name) for folder in ("a", "b"))
    assert paths[0].name == "a-red-cat-5.png"
    assert one.text == {
        "prompt": "a red / cat",
        "negative_prompt": "", "seed": "5", "num_inference_steps": "2", "guidance_scale": "3.0",
    }  # fmt: skip
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("trust", [False, True])
def test_samples_start_from_an_image(model, tmp_path, trust):
    Image.new("RGBA", (51, 41), (200, 0, 0, 255)).save(tmp_path / "red.png")
    Image.new("RGBA", (50, 40), (255, 255, 255, 0)).save(tmp_path / "nothing.png")
    more = {"num_inference_steps": 4, "guidance_scale": 1.0, "trust_remote_code": trust}
    start = {"image": str(tmp_path / "red.png"), "strength": 0.5}
    (path,) = sample(["a cat"], str(model), str(tmp_path / "out"), **start, **more)
    drawn = Image.open(path)
    assert (drawn.size, drawn.text["strength"]) == ((50, 40), "0.5")  # its own, in whole latents
    assert str(tmp_path) not in str(drawn.text)
    start = {"image": str(tmp_path / "red.png"), "mask_image": str(tmp_path / "nothing.png")}
    (path,) = sample(["a cat"], str(model), str(tmp_path / "kept"), **start, **more)
    assert (Image.open(path).size, Image.open(path).text["strength"]) == ((50, 40), "1.0")
    (path,) = sample(["a dog"], str(model), str(tmp_path / "all"), image=str(tmp_path / "red.png"), **more)
    assert Image.open(path).text["strength"] == "0.8"
    (again,) = sample(["a dog"], str(model), str(tmp_path / "more"), image=str(path), **more)
    assert again.read_bytes() != path.read_bytes()
    for wrong, message in (
        ({"strength": 0.5}, "need an image to start from; name --image"),
        ({"image": "none.png"}, "image: none.png: .*No such file"),
        ({"image": str(model / "model_index.json")}, "image: .*not an image in"),
        ({"image": str(tmp_path / "red.png"), "strength": 7.0}, "strength: got 7; expected at most 1"),
        ({"image": str(tmp_path / "red.png"), "strength": 0.0}, "strength: got 0; expected at most 1"),
        ({"image": str(tmp_path / "red.png"), "strength": 0.2}, "strength: got 0.2; .* at least one of the 4 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(["a cat"], str(model), str(tmp_path), **wrong, **more)
    over = {"image": str(again), "overwrite": True}
    with pytest.raises(ValueError, match=r"more/a-dog-0\.png is an input and would be overwritten; name another --out"):
        sample(["a dog"], str(model), str(again.parent), **over, **more)


@pytest.mark.slow
def test_the_launcher_leaves_every_core_to_one_process(vae, tmp_path):
    command = [
        Path(sys.executable).parent / "accelerate",
        "launch",
        "train_vae.py",
        "--config",
        "configs/tiny/vae.yaml",
    ]
    command += ["--output_dir", tmp_path, "--loop.max_train_steps", "1", "--optim.warmup_steps", "0"]
    every = partial(os.sched_setaffinity, 0, CORES)  # the tests themselves have one
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, preexec_fn=every)
    assert done.returncode == 0, done.stderr
    assert f"{len(CORES)} thread(s) each" in done.stderr
    assert list((tmp_path / "logs").rglob("events*"))


def test_a_stable_diffusion_folder_can_be_trained_further(model, tmp_path, monkeypatch):
    again = train_model(
        monkeypatch,
        tmp_path,
        model / "vae",
        *("--denoiser", f"{{_class_name: UNet2DConditionModel, pretrained: {model}, subfolder: unet}}"),
        *("--conditioners.text.pretrained", model, "--conditioners.text.encoder", "{}"),
        *("--optim.learning_rate", "1e-9", "--loop.max_train_steps", "8"),
    )
    names = {path.name for path in again.iterdir()}
    assert {"unet", "vae", "text_encoder", "tokenizer"} <= names
    for part in ("unet", "text_encoder", "vae"):  # the rate is next to nothing: what came out is what went in
        one, two = (load_file(next((folder / part).glob("*.safetensors"))) for folder in (model, again))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one), part


@pytest.mark.slow
def test_nothing_needs_torchvision_or_warns_that_it_is_missing():
    code = "import sys; sys.modules['torchvision'] = None; import train_vae, train_text2img, ldm.commands.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_config_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_autoencoder(monkeypatch, tmp_path, "--optim.learning_rate", "fast")
    assert stopped.value.code == 2
    assert "optim.learning_rate: got 'fast' (str); expected float" in capsys.readouterr().err
