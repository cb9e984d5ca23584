"""Every system through the one loop, and what is its own: pipeline, card, numbers, and what the shell asks of it.

Kill, resume, doctor and push are of the loop and the model folder, which all share: test_resume.py, test_doctor.py and
test_hub.py take Stable Diffusion's kind through them.
"""

import json
import multiprocessing
import os
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import ldm.training.loop as loop_module
import train_text2img
from ldm.commands import cli
from ldm.commands.sample import sample
from ldm.export.hub import model_files

from . import coloured_shapes
from .test_entry import call, train_autoencoder, train_model
from .test_pipeline_folder import be_without_this_project

CLASSES = len(coloured_shapes.COLOURS)
FOLDER = ("--data.source", "imagefolder", "--data.held_out", "{}", "--data.held_out_percent", "10")
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TRANSFORMER = {
    "_class_name": "PixArtTransformer2DModel",
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
}
KEYWORDS = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "attention_mask"}
SYSTEMS = {
    "nothing": ("DDPMPipeline", ()),
    "bound": (
        "DDPMPipeline",
        (
            *FOLDER,
            *("--objective.path", "cosine", "--objective.num_train_timesteps", "16", "--denoiser.out_channels", "6"),
            *("--objective.variational_weight", "1", "--objective.variational_only", "true"),
            *("--objective.timestep_density", "loss_second_moment", "--validation.num_inference_steps", "4"),
        ),
    ),
    "classes": (
        "PixelPipeline",
        (
            *FOLDER,
            *("--data.class_column", "colour", "--conditioners.label.num_classes", CLASSES),
            *("--denoiser.num_class_embeds", CLASSES + 1, "--validation.guidance_scale", "2"),
        ),
    ),
}
"""What configs/tiny/ddpm.yaml is told: the class that the folder is loaded as, and what is changed."""
LATENT = {
    "transformer": (
        "PixArtAlphaPipeline",
        (
            *("--denoiser", json.dumps(TRANSFORMER), "--conditioners.text.keywords", json.dumps(KEYWORDS)),
            *("--validation.guidance_scale", "2"),
        ),
    ),
}
"""The same of configs/tiny/text2img.yaml, in the latents of a tiny autoencoder."""


def write_classes(folder):
    """Write shapes whose class is their colour."""
    rows = []
    for copy in range(2):
        for combination, image in zip(coloured_shapes.COMBINATIONS, coloured_shapes.images(copy), strict=True):
            name = f"{copy}-{'-'.join(combination)}.png"
            image.save(folder / name)
            rows.append({"file_name": name, "text": "", "colour": coloured_shapes.COLOURS.index(combination[0])})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    write_classes(folder)
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return train_autoencoder(patch, tmp_path_factory.mktemp("autoencoder"))


def train(monkeypatch, told, data, folder, *more):
    """Train in pixels, or with a folder `data` of an autoencoder in its latents."""
    if told in LATENT:
        return train_model(monkeypatch, folder, data, *LATENT[told][1], *more)
    words = ("--config", "configs/tiny/ddpm.yaml", "--output_dir", folder, *SYSTEMS[told][1], *more)
    if told != "nothing":
        words += ("--data.path", data)
    call(train_text2img.main, monkeypatch, *words)
    return folder / "model"


@pytest.fixture(scope="module", params=LATENT)
def latent(request, autoencoder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return request.param, train(
            patch, request.param, autoencoder, tmp_path_factory.mktemp("latent") / request.param
        )


@pytest.fixture(scope="module", params=SYSTEMS)
def trained(request, data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return request.param, train(patch, request.param, data, tmp_path_factory.mktemp("systems") / request.param)


def metrics(model):
    return [json.loads(line) for line in (model.parent / "metrics.jsonl").read_text().splitlines()]


def own_pipeline(model):
    return DiffusionPipeline.from_pretrained(model, custom_pipeline=str(model), trust_remote_code=True)


def same_files(one, two):
    names = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    assert names == sorted(p.relative_to(two) for p in two.rglob("*.safetensors"))
    assert names
    for name in names:
        a, b = load_file(one / name), load_file(two / name)
        assert all(torch.equal(a[key], b[key]) for key in a), name


class Killed(BaseException):
    """The end of a process."""


def killed_at(monkeypatch, step):
    """Make the loop die after `step` optimiser steps."""
    take = loop_module.Loop._take_step

    def dying(self, micro_batches):
        if self.progress.global_step == step:
            raise Killed
        return take(self, micro_batches)

    monkeypatch.setattr(loop_module.Loop, "_take_step", dying)


def untimed(model):
    return [{**row, "images_per_second": 0} for row in metrics(model)]


@pytest.mark.parametrize("trained", ["bound"], indirect=True)
def test_a_density_that_learns_from_losses_resumes_as_if_not_killed(trained, data, tmp_path, monkeypatch):
    told, model = trained
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 27)  # 20 is the last save before it
        train(patch, told, data, tmp_path / "again")
    resumed = train(monkeypatch, told, data, tmp_path / "again")
    same_files(model, resumed)
    assert untimed(model) == untimed(resumed)


@pytest.mark.slow
def test_the_cache_of_latents_changes_nothing(latent, autoencoder, tmp_path, monkeypatch):
    told, model = latent
    again = train(monkeypatch, told, autoencoder, tmp_path / "again", "--data.cache", "false")
    ours, theirs = ([row["loss/denoiser"] for row in metrics(of) if "loss/denoiser" in row] for of in (model, again))
    assert ours == pytest.approx(theirs, rel=1e-3)  # encoded in other batches, rounded otherwise


def test_training_helps_and_leaves_what_people_look_for(trained):
    told, model = trained
    losses = [row["loss/denoiser"] for row in metrics(model) if "loss/denoiser" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert Image.open(sorted((model.parent / "samples").iterdir())[-1]).width > 100
    assert not (model.parent / "alarms.jsonl").exists()
    measured = metrics(model)[-1]
    assert ("conditional_gain/mean" in measured) == (told == "classes"), "what classes are worth, where there are any"
    assert "captions/cut" not in measured


def test_guidance_away_from_a_class_that_is_never_shown_is_an_alarm(data, tmp_path, monkeypatch):
    more = ("--loop.max_train_steps", "6", "--conditioners.label.dropout", "0")
    train(monkeypatch, "classes", data, tmp_path, *more)
    (alarm,) = map(json.loads, (tmp_path / "alarms.jsonl").read_text().splitlines())
    assert alarm["sentence"].startswith("conditioners.label.dropout is 0")


@pytest.mark.slow
@pytest.mark.parametrize(("told", "kind"), [("nothing", "dpm_solver"), ("bound", "ddpm"), ("classes", "ddim")])
def test_the_doctor_finds_nothing_wrong(told, kind, data, tmp_path, monkeypatch):
    # 16 timesteps are too few for any sampler to be right
    more = ("--sampler.kind", kind, "--validation.num_inference_steps", "50", "--loop.max_train_steps", "200")
    more += ("--objective.num_train_timesteps", "1000", "--validation.num_images", "2", "--validation.loss_images", "4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.doctor.overfit.MAX_STEPS", 2)
        train(monkeypatch, told, data, tmp_path, "--doctor", *more)
    findings = json.loads((tmp_path / "doctor" / "report.json").read_text())["findings"]
    assert [finding["name"] for finding in findings if not finding["ok"]] == []
    assert "objective and scheduler" in {finding["name"] for finding in findings}


def drawn_by_a_stranger(model, kind, to):
    be_without_this_project()
    pipe = DiffusionPipeline.from_pretrained(model) if kind == "DDPMPipeline" else own_pipeline(model)
    assert type(pipe).__name__ == kind
    images = pipe(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np")
    np.save(to, images.images)


def test_it_is_loaded_and_drawn_where_this_project_is_absent(trained, tmp_path):
    told, model = trained
    fork = multiprocessing.get_context("fork")
    stranger = fork.Process(target=drawn_by_a_stranger, args=(model, SYSTEMS[told][0], tmp_path / "drawn.npy"))
    stranger.start()
    stranger.join(120)
    assert stranger.exitcode == 0
    call = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    own = own_pipeline(model)(batch_size=2, **call).images
    np.testing.assert_allclose(np.load(tmp_path / "drawn.npy"), own, atol=1e-5)


def test_it_is_measured_on_images_held_out_by_their_hash(trained, data, tmp_path):
    told, model = trained
    vision = CLIPVisionConfig(**TINY, image_size=16, patch_size=8, projection_dim=12)
    CLIPVisionModelWithProjection(vision).save_pretrained(tmp_path / "vision")
    settings = {
        "data": data,
        "held_out_percent": 10,
        "network": tmp_path / "vision",
        "num_inference_steps": 2,
        "num_images_per_prompt": 2,
        "bound_timesteps": 3,
        "trust_remote_code": "true",
        "out": tmp_path,
    }
    if told == "classes":
        settings |= {"class_column": "colour", "classes": "0,2"}
    command = ["evaluate", str(model), *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]
    cli.main(command)
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for section in report["sections"] for row in section["rows"]}
    assert 0 < rows["bits per dimension"]["value"] < 30
    assert rows["bits per dimension"]["beside"].keys() == {"pixel by pixel"}
    judged = [name for name in rows if name.startswith("class")]
    assert judged == (["class told apart, vision", "class 0", "class 2"] if told == "classes" else [])


def test_its_card_says_how_it_is_loaded(trained, monkeypatch):
    told, model = trained
    card = ModelCard.load(model / "README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.tags == ["unconditional-image-generation", "pixel-diffusion"]
    snippets = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(snippets) == (2 if SYSTEMS[told][0] == "DDPMPipeline" else 1), "one for each class that can load it"
    monkeypatch.chdir(model.parent)
    for snippet in snippets:
        exec(snippet, {})  # noqa: S102
        assert Image.open("image.png").size == (16, 16)


def test_what_is_pushed_of_it_is_the_pipeline_and_nothing_of_a_latent_one(trained):
    pushed = set(model_files(trained[1]))
    assert {"model_index.json", "pipeline.py", "README.md", "unet/diffusion_pytorch_model.safetensors"} <= pushed
    assert not {name for name in pushed if "checkpoint" in name or "vae" in name}


def test_the_shell_draws_it(trained, tmp_path):
    told, model = trained
    call = {"num_inference_steps": 2, "trust_remote_code": True}
    (path,) = sample([""], str(model), str(tmp_path), **call)
    assert Image.open(path).size == (16, 16)
    taken = "the number of a class" if told == "classes" else 'no prompt but ""'
    with pytest.raises(ValueError, match=f"PixelPipeline takes {taken}"):
        sample(["a cat"], str(model), str(tmp_path), **call)
    if told == "classes":
        (path,) = sample(["3"], str(model), str(tmp_path), **call)
        assert Image.open(path).text["prompt"] == "3"
        with pytest.raises(ValueError, match="--trust_remote_code true"):
            sample([""], str(model), str(tmp_path), num_inference_steps=2)


def test_training_in_latents_helps(latent):
    _, model = latent
    losses = [row["loss/denoiser"] for row in metrics(model) if "loss/denoiser" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert Image.open(sorted((model.parent / "samples").iterdir())[-1]).width > 100
    assert not (model.parent / "alarms.jsonl").exists(), "also: what is dropped is what the pipeline makes of no prompt"
    assert {"conditional_gain/mean", "captions/cut"} <= metrics(model)[-1].keys()


def prompted_by_a_stranger(model, to):
    be_without_this_project()
    os.chdir(model.parent)
    (snippet, own) = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)
    np.save(to, np.stack([image_of(code) for code in (snippet, own)]))


def image_of(snippet):
    torch.manual_seed(0)
    exec(snippet, {})  # noqa: S102
    return np.asarray(Image.open("image.png"))


def test_latents_are_drawn_where_this_project_is_absent(latent, tmp_path):
    _, model = latent
    fork = multiprocessing.get_context("fork")
    stranger = fork.Process(target=prompted_by_a_stranger, args=(model, tmp_path / "drawn.npy"))
    stranger.start()
    stranger.join(120)
    assert stranger.exitcode == 0
    stock, own = np.load(tmp_path / "drawn.npy")
    assert np.abs(stock.astype(int) - own).max() <= 1, "as the card says, in plain diffusers and in ours"
    assert own.shape == (32, 32, 3)


def test_latents_are_drawn_by_the_shell_and_what_is_pushed_is_whole(latent, tmp_path):
    _, model = latent
    weights = "diffusion_pytorch_model.safetensors"
    assert {"pipeline.py", "README.md", f"transformer/{weights}", f"vae/{weights}"} <= set(model_files(model))
    start = {"image": str(model / "samples.png"), "strength": 0.5}
    call = {"num_inference_steps": 4, "trust_remote_code": True}
    (path,) = sample(["a cat"], str(model), str(tmp_path), **call, **start)
    with Image.open(path) as drawn, Image.open(model / "samples.png") as sheet:
        assert drawn.size == tuple(pixels // 4 * 4 for pixels in sheet.size), "its own, in whole patches of latents"
    (plain,) = sample(["a cat"], str(model), str(tmp_path / "plain"), num_inference_steps=4)
    (own,) = sample(["a cat"], str(model), str(tmp_path / "own"), **call)
    levels = np.asarray(Image.open(plain)).astype(int) - np.asarray(Image.open(own))
    assert np.abs(levels).max() <= 1, "drawn by the stock class as by ours"
    with pytest.raises(ValueError, match="PixArtAlphaPipeline starts from no image, and diffusers has no other"):
        sample(["a cat"], str(model), str(tmp_path), num_inference_steps=4, **start)
