"""Every system through the one loop: trained, killed, resumed, looked at, saved, and drawn by strangers."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

import train_text2img
from ldm import cli

from .test_entry import call, killed_at, same_files
from .test_pipeline_folder import be_without_this_project

SYSTEMS = {"ddpm": "DDPMPipeline"}
"""Names of configs/tiny, and the class that diffusers loads their folders as."""


def train(monkeypatch, system, folder, *more):
    call(train_text2img.main, monkeypatch, "--config", f"configs/tiny/{system}.yaml", "--output_dir", folder, *more)
    return folder / "model"


@pytest.fixture(scope="module", params=SYSTEMS)
def trained(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return request.param, train(patch, request.param, tmp_path_factory.mktemp("systems") / request.param)


def metrics(model):
    return [json.loads(line) for line in (model.parent / "metrics.jsonl").read_text().splitlines()]


def test_killed_and_resumed_equals_uninterrupted(trained, tmp_path, monkeypatch):
    system, model = trained
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_at(patch, 27)  # 20 is the last save before it
        train(patch, system, tmp_path / "again")
    train(monkeypatch, system, tmp_path / "again")
    same_files(model, tmp_path / "again" / "model")
    models = model, tmp_path / "again" / "model"
    one, two = ([{**row, "images_per_second": 0} for row in metrics(folder)] for folder in models)
    assert one == two


def test_training_helps_and_leaves_what_people_look_for(trained):
    _, model = trained
    losses = [row["loss/denoiser"] for row in metrics(model) if "loss/denoiser" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert Image.open(sorted((model.parent / "samples").iterdir())[-1]).width > 100
    assert not (model.parent / "alarms.jsonl").exists()
    assert "pip" in ModelCard.load(model / "README.md").text


def drawn_by_a_stranger(model, kind, to):
    be_without_this_project()
    pipe = DiffusionPipeline.from_pretrained(model)
    assert type(pipe).__name__ == kind
    pictures = pipe(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np")
    np.save(to, pictures.images)


def test_it_is_loaded_and_drawn_where_this_project_is_absent(trained, tmp_path):
    system, model = trained
    fork = multiprocessing.get_context("fork")
    stranger = fork.Process(target=drawn_by_a_stranger, args=(model, SYSTEMS[system], tmp_path / "drawn.npy"))
    stranger.start()
    stranger.join(120)
    assert stranger.exitcode == 0
    own = DiffusionPipeline.from_pretrained(model, custom_pipeline=str(model), trust_remote_code=True)
    call = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    np.testing.assert_allclose(np.load(tmp_path / "drawn.npy"), own(batch_size=2, **call).images, atol=1e-5)


def test_the_shell_draws_it(trained, tmp_path):
    (path,) = cli.sample([""], str(trained[1]), str(tmp_path), num_inference_steps=2, trust_remote_code=True)
    assert Image.open(path).size == (16, 16)
    with pytest.raises(ValueError, match="takes class_labels and no text"):
        cli.sample(["a cat"], str(trained[1]), str(tmp_path), num_inference_steps=2, trust_remote_code=True)
