"""Pushing, over HTTP, with the real client against a Hub on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from huggingface_hub import ModelCard

import train_vae
from ldm.commands import cli
from ldm.config import StageConfig
from ldm.config.file import load_config
from ldm.errors import HubError
from ldm.export.card import write_card
from ldm.export.hub import check, push
from ldm.export.kinds import KINDS
from ldm.export.pipeline_card import pipeline_card
from ldm.models.provenance import Provenance
from tests.fake_hub import DROP, TOKEN, FakeHub
from tests.tiny_pipeline import FLOW, arrays, pipeline, vae

from .table import table

ROOT = Path(__file__).parent.parent
PRIVATE = {
    *(
        "optimizer.bin",
        "pytorch_model.bin",
        "state.pkl",
        "model.pth",
        "model.ckpt",
        "random_states_0.pkl",
        "unet/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
        "events.out.tfevents.1.host",
        "metrics.jsonl",
        "training.log",
        "secret.txt",
        ".env",
        "credentials.json",
        "notes.md",
    ),
    *(
        "checkpoints/step-1/denoiser-weights.safetensors",
        "checkpoints/step-1/state.json",
        "logs/events.out",
        ".git/config",
    ),
    *("optimizer.safetensors", "unet/optimizer.bin", "unet/checkpoints/model.safetensors", "samples/step-1.png"),
}
STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ldm", "pipelines", "tests"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
name, out = sys.argv[1:]
stock = DiffusionPipeline.from_pretrained(name)
own = DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True)
assert [type(pipe).__name__ for pipe in (stock, own)] == ["StableDiffusionPipeline", "TextToImagePipeline"]
call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
np.save(out, [pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images for pipe in (stock, own)])
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub of this process's client."""
    with FakeHub() as hub:
        hub.serve(monkeypatch, tmp_path)
        yield hub


def environment(hub, home):
    """What a new process needs to use `hub`."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return os.environ | own


@pytest.fixture
def model(tmp_path):
    """A model folder, and beside the model what must not leave the machine."""
    folder = tmp_path / "run" / "model"
    pipeline(scheduler=DPMSolverMultistepScheduler(**FLOW)).save_pretrained(folder)
    record = Provenance("data", "0" * 32, 64, 40, 1.0, 64.0, "cpu", {})
    record.save(folder)
    config = load_config(StageConfig, ["--config", str(ROOT / "configs/tiny/text2img.yaml")])
    write_card(folder, folder.parent, config, pipeline_card(KINDS[0], config, 0), record)
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(main, monkeypatch, *words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", *map(str, words), "--loop.trackers", "[]"])
    try:
        main()
    finally:
        torch.set_num_threads(1)


def train_autoencoder(monkeypatch, folder, *words):
    call(train_vae.main, monkeypatch, "--config", "configs/tiny/vae.yaml", "--output_dir", folder, *words)
    return folder / "model"


# ---- what arrives ----


def test_s06_the_model_arrives_and_nothing_else(hub, model):
    expected = files(model)
    for name in PRIVATE:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(b"private")
    before = files(model)
    assert push(model, "me/model") == f"{hub.url}/me/model"
    assert files(model) == before
    ((message, arrived),) = hub.repositories["me/model"].commits
    assert message == "Model at step 40"
    assert arrived.keys() == expected.keys()
    assert len(arrived) > 10
    assert {name for name in arrived if arrived[name] != expected[name]} == {"README.md"}
    assert 'model = "me/model"' in arrived["README.md"].decode()
    assert not hub.repositories["me/model"].private


@pytest.mark.slow
def test_what_arrived_is_loaded_and_draws_the_same_where_this_project_is_absent(hub, model, tmp_path):
    push(model, "me/model")
    environ = environment(hub, tmp_path / "home")
    del environ["HF_TOKEN"]
    command = [sys.executable, "-c", STRANGER, "me/model", str(tmp_path / "drawn.npy")]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    expected = arrays(DiffusionPipeline.from_pretrained(model))
    for drawn in np.load(tmp_path / "drawn.npy"):
        np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_s06_the_same_model_twice_is_one_commit(hub, model):
    push(model, "me/model")
    push(model, "me/model")
    assert len(hub.repositories["me/model"].commits) == 1


def test_an_autoencoder_arrives(hub, tmp_path):
    vae().save_pretrained(tmp_path / "vae")
    push(tmp_path / "vae", "me/vae")
    assert hub.repositories["me/vae"].files.keys() == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_private_is_private_or_refused(hub, model):
    push(model, "me/model", private=True)
    assert hub.repositories["me/model"].private
    push(model, "me/public")
    for refused in (lambda: push(model, "me/public", private=True), lambda: check("me/public", private=True)):
        with pytest.raises(HubError, match="is public"):
            refused()


def test_a_folder_without_a_model_is_refused(hub, tmp_path):
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ValueError, match=r"neither model_index\.json nor config\.json"):
        push(tmp_path, "me/model")
    with pytest.raises(SystemExit, match="OUTPUT_DIR/model"):
        cli.main(["push", str(tmp_path), "me/model"])
    assert hub.requests == []


@pytest.mark.parametrize("what", ["component", "file", "folder"])
def test_s06_nothing_outside_of_the_folder_is_pushed(hub, model, what):
    elsewhere = model.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("private")
    (elsewhere / "vocab.txt").write_text("private")
    if what == "component":
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps(index | {"../elsewhere": ["diffusers", "AutoencoderKL"]}))
    elif what == "file":
        (model / "vocab.txt").symlink_to(elsewhere / "vocab.txt")
    else:
        shutil.move(model / "vae", model.parent / "vae")
        (model / "vae").symlink_to(model.parent / "vae")
    said = "the name of a folder beside it" if what == "component" else "is a link that leads out"
    with pytest.raises(ValueError, match=said):
        push(model, "me/model")
    assert not any(request.startswith("POST") for request in hub.requests)


# ---- what fails ----


@pytest.mark.slow
@table(
    ("what", "how"),
    [*(("commit", how) for how in (500, DROP, 401, 403, 409)), ("create", 500), ("create", DROP), ("lfs", 401)],
)
def test_s06_a_failed_push_leaves_both_sides_whole_and_the_next_one_succeeds(hub, model, what, how, capsys):
    name = f"me/{what}-{how}"
    push(model, name)
    (model / "config.json").write_text(json.dumps({"changed": name}))
    before = files(model)
    hub.fail(what, how)
    with pytest.raises(HubError) as failed:
        push(model, name)
    assert files(model) == before
    assert len(hub.repositories[name].commits) == 1
    said = str(failed.value)
    again = re.search("to push it again: ldm (.*)", said)[1].split()
    assert again == ["push", str(model), name]
    assert TOKEN not in said
    assert "\n" not in said
    cli.main(again)
    assert f"{hub.url}/{name}" in capsys.readouterr().out
    assert "config.json" in hub.repositories[name].files


def test_s06_the_command_says_what_failed_in_one_line(hub, model):
    hub.fail("commit", 500)
    with pytest.raises(SystemExit, match=r"500.*ldm push .* me/model --private true"):
        cli.main(["push", str(model), "me/model", "--private", "true"])


@table(
    ("name", "message"),
    [
        ("model", "must be user/name"),
        ("a/b/c", "must be user/name"),
        ("me/a b", "alphanumeric"),
        ("me/a--b", "Cannot have --"),
        ("somebody/model", "403"),
    ],
)
def test_names_that_cannot_be_pushed_to_are_refused_at_the_start(hub, name, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        train_autoencoder(monkeypatch, tmp_path / "out", "--push_to_hub", name)
    assert re.search(message, str(stopped.value.code))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_s06_tokens_that_cannot_push_are_refused_at_the_start(hub, monkeypatch):
    hub.role = "read"
    with pytest.raises(HubError, match="may only read; make one that may write"):
        check("me/model")
    hub.fail("whoami", 401)
    with pytest.raises(HubError, match="Invalid user token"):
        check("me/model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="run `hf auth login`, or set HF_TOKEN"):
        check("me/model")
    with pytest.raises(HubError, match="run `hf auth login`, or set HF_TOKEN"):
        push(ROOT / "assets" / "openmoji-vae", "me/model")
    assert hub.repositories == {}


def test_a_push_every_zero_steps_is_refused(hub, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_autoencoder(monkeypatch, tmp_path, "--push_to_hub", "me/vae", "--push_every_steps", "0")
    assert "push_every_steps: got 0" in capsys.readouterr().err


# ---- while training ----


def test_s06_a_push_that_fails_at_the_end_loses_nothing(hub, tmp_path, monkeypatch):
    vae().save_pretrained(tmp_path / "start")
    short = ["--autoencoder", f"{{_class_name: AutoencoderKL, pretrained: {tmp_path / 'start'}}}"]
    short += ["--loop.max_train_steps", "8"]
    hub.fail("commit", None, 500)  # the first one is that of step 5
    with pytest.raises(SystemExit, match=r"not pushed to me/vae: .*500.*again: ldm push"):
        train_autoencoder(monkeypatch, tmp_path / "a", *short, "--push_to_hub", "me/vae", "--push_every_steps", "5")
    model = tmp_path / "a" / "model"
    weights = {"config.json", "diffusion_pytorch_model.safetensors"}
    about = {"training.json", "trained_images.safetensors", "README.md", "samples.png"}
    assert {path.name for path in model.iterdir()} == weights | about
    assert json.loads((model / "training.json").read_text())["global_step"] == 8
    assert [message for message, _ in hub.repositories["me/vae"].commits] == ["Model at step 5"]
    cli.main(["push", str(model), "me/vae"])
    assert [message for message, _ in hub.repositories["me/vae"].commits] == ["Model at step 5", "Model at step 8"]

    assert not [name for name, content in files(model).items() if str(tmp_path).encode() in content]

    without = train_autoencoder(monkeypatch, tmp_path / "b", *short)
    weights = "diffusion_pytorch_model.safetensors"
    assert (model / weights).read_bytes() == (without / weights).read_bytes(), "pushing changes what is trained"
    assert ModelCard.load(without / "README.md").data.eval_results


@pytest.mark.slow
def test_s06_text2img_is_trained_and_pushed_by_one_command(tmp_path):
    vae().save_pretrained(tmp_path / "vae")
    command = [sys.executable, "train_text2img.py", "--config", "configs/tiny/text2img.yaml"]
    command += ["--space.autoencoder", tmp_path / "vae", "--output_dir", tmp_path / "out"]
    command += ["--push_to_hub", "me/emoji", "--push_every_steps", "5", "--push_private", "true"]
    command += ["--loop.max_train_steps", "12"]
    with FakeHub() as hub:
        hub.fail("commit", 500)
        environ = environment(hub, tmp_path / "home") | {"HF_TOKEN": TOKEN}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search("WARNING.*step 5: not pushed to me/emoji: .*500", done.stderr)
    repository = hub.repositories["me/emoji"]
    assert [message for message, _ in repository.commits] == ["Model at step 10", "Model at step 12"]
    assert repository.private
    assert {"model_index.json", "pipeline.py", "samples.png", "README.md"} <= repository.files.keys()
    assert len(list((tmp_path / "out" / "logs").rglob("events*"))) == 1
    card = repository.files["README.md"].decode()
    assert "DiffusionPipeline.from_pretrained(model)" in card
    for told in (str(tmp_path), str(Path.home()) + "/"):
        assert told not in card
    written = {**files(tmp_path / "out"), "out": done.stdout.encode(), "err": done.stderr.encode()}
    assert [name for name, content in {**written, **repository.files}.items() if TOKEN.encode() in content] == []
