"""A new kind of training and a new pipeline are one registration each, and go from config to card without more."""

import json
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import train_text2img
from ldm.conditioners.text import KEYWORDS
from ldm.config import Network, RunConfig, StageConfig
from ldm.config.file import load_config
from ldm.data.batches import PositionDataset, fixed_batch
from ldm.doctor.findings import Finding
from ldm.evaluation.retrieval import retrieval_ranks
from ldm.export import kinds
from ldm.export.card import CardText
from ldm.export.kinds import PipelineKind
from ldm.models.provenance import read_provenance
from ldm.recipes.diffusion import diffusion_recipe
from ldm.recipes.recipe import Recipe, train
from ldm.training.averages import Average, exponential

from .coloured_shapes import PIXELS, write_shapes

RUN = {
    "data.source": "imagefolder",
    "data.image_size": PIXELS,
    "data.batch_size": 8,
    "loop.mixed_precision": "no",
    "loop.trackers": "[]",
    "loop.log_every_steps": 1,
    "loop.save_every_steps": 2,
    "loop.validate_every_steps": 2,
}


def read(kind, folder, **more):
    values = RUN | {"output_dir": folder / "run", "data.path": folder / "images"} | more
    return load_config(kind, [word for name, value in values.items() for word in (f"--{name}", str(value))])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    write_shapes(tmp_path / "images", copies=1)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # one: see conftest
    monkeypatch.setattr(sys, "argv", ["train"])
    return tmp_path


# ---- a kind of training: one colour for all images ----


@dataclass(frozen=True)
class ColourConfig(RunConfig):
    """The mean colour of the images, by gradient descent."""

    network: Network
    """No keys."""


class ColourStep:
    """Compares one colour with the images."""

    networks, frozen, frozen_networks, tokenizer = (), {}, (), None

    def __init__(self, run, ema_decay):
        self.run, self.memory = run, {}
        colour = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(colour.weight)
        self.modules = {"colour": colour}
        self.forwards = {"colour": run.prepare(colour)}
        self.averages = {"colour": Average(colour, exponential(ema_decay))}

    def losses(self, batch, global_step):
        return {"colour": (batch.pixel_values.mean((2, 3)) - self.modules["colour"].weight).square().mean()}

    def after_step(self):
        pass

    def not_finite_at(self):
        return []


def colour_recipe(config, run, images):
    step = ColourStep(run, config.optim.ema_decay)
    held_out = fixed_batch(PositionDataset(images, "validation", config.seed), 8)

    def validate(global_step):
        run.log_metrics({"validation/loss": step.losses(held_out, 0)["colour"].item()}, global_step)
        run.log_image("colours", Image.new("RGB", (8, 8)), global_step)

    def findings(dataset):
        validate(0)
        yield Finding("colour", True, f"{len(dataset)} images have one")

    def save(folder):
        folder.mkdir(exist_ok=True)
        save_file({"colour": step.averages["colour"].module.weight.data}, folder / "colour.safetensors")

    return Recipe(
        step=step,
        parts=[],
        rehearse=lambda: step.losses(held_out, 0),
        dataset=lambda: PositionDataset(images, "train", config.seed),
        events=lambda loop: [(config.loop.validate_every_steps, validate)],
        alarms=lambda dataset: [("colour", "all images are grey")],
        findings=findings,
        save=save,
        card=CardText(
            title="Mean colour",
            about="A colour.",
            sheet="![a square of it](samples.png)",
            sheets="colours",
            loading="Read `colour.safetensors`.",
            measured="the squared error of a few held-out images.",
            notes={},
            task="feature-extraction",
            pipeline_tag=None,
            tags=["colour"],
        ),
    )


def test_a_kind_of_training_is_one_function_from_config_to_card(folder, capsys):
    words = {"network": "{}", "optim.learning_rate": 0.05, "optim.ema_decay": 0.5}
    train(read(ColourConfig, folder, **words, **{"loop.max_train_steps": 20}), colour_recipe, "train_colour.py")
    train(read(ColourConfig, folder, **words, **{"loop.max_train_steps": 40}), colour_recipe, "train_colour.py")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["validation/loss"] for row in rows if "validation/loss" in row}
    assert sorted(losses) == list(range(2, 41, 2)), "the second start goes on from the first"
    assert losses[40] < 0.5 * losses[2]
    model = folder / "run" / "model"
    assert load_file(model / "colour.safetensors")["colour"].mean() > 0.2, "the images are light"
    assert read_provenance(model).global_step == 40
    card = ModelCard.load(model / "README.md")
    assert card.text.startswith("\n# Mean colour\n\nA colour.\n")
    assert f"| loss | {losses[40]:.4g} |" in card.text
    assert (card.data.tags, card.data.pipeline_tag) == (["colour"], None)
    assert (model / "samples.png").is_file()
    assert "all images are grey" in (folder / "run" / "alarms.jsonl").read_text()
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        more = {"loop.max_train_steps": 60, "seed": 1}
        train(read(ColourConfig, folder, **words, **more), colour_recipe, "train_colour.py")
    train(read(ColourConfig, folder, **words, doctor="{}"), colour_recipe, "train_colour.py")
    assert "images have one\nnothing is wrong" in capsys.readouterr().out
    left = {path.name for path in (folder / "run" / "doctor").iterdir()} - {".lock"}
    assert left == {"report.txt", "report.json"}


# ---- a pipeline: images from prompts, in pixels ----


class TextPixelPipeline(DiffusionPipeline):
    """The sampling loop with nothing around it."""

    def __init__(self, unet, text_encoder, tokenizer, scheduler):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)

    def encode_prompt(self, prompt, device):
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        embeds = self.text_encoder(tokens.reshape(-1, tokens.shape[-1]).to(device))[0]
        return embeds, embeds

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps, guidance_scale, generator, output_type="np", **more):
        embeds, _ = self.encode_prompt(prompt, self.device)
        x_t = torch.stack([torch.randn(3, PIXELS, PIXELS, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            output = self.unet(x_t, timestep, encoder_hidden_states=embeds).sample
            x_t = self.scheduler.step(output, timestep, x_t).prev_sample
        return ImagePipelineOutput((x_t.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy())


MASKED = {**KEYWORDS, "encoder_attention_mask": "attention_mask"}
KIND = PipelineKind(
    own="TextPixelPipeline",
    stock="TextPixelPipeline",
    space="pixel",
    denoiser="UNet2DConditionModel",
    conditions={"text": MASKED},
    components={
        "unet": "model.denoiser",
        "text_encoder": "model.conditioners.text.text_encoder",
        "tokenizer": "model.conditioners.text.tokenizer",
    },
    asks="prompt",
    task="text-to-image",
    stock_samplers=(),
)
STAGE = {
    "space.kind": "pixel",
    "denoiser": "{_class_name: UNet2DConditionModel, sample_size: 16, in_channels: 3, out_channels: 3, "
    "down_block_types: [CrossAttnDownBlock2D], up_block_types: [CrossAttnUpBlock2D], block_out_channels: [16], "
    "layers_per_block: 1, cross_attention_dim: 16, attention_head_dim: 2, norm_num_groups: 8}",
    "conditioners.text.encoder": "{_class_name: CLIPTextModel, hidden_size: 16, intermediate_size: 16, "
    "num_hidden_layers: 1, num_attention_heads: 2}",
    "conditioners.text.keywords": "{encoder_hidden_states: prompt_embeds, encoder_attention_mask: attention_mask}",
    "conditioners.text.vocab_size": 600,
    "loop.max_train_steps": 2,
    "validation.num_images": 2,
    "validation.retrieval_images": 1,
    "validation.num_inference_steps": 2,
    "validation.loss_images": 4,
}


def test_a_pipeline_is_one_record_from_config_to_card(folder, monkeypatch):
    ranked = []

    def ranks(generated, gallery, own):
        ranked.append((len(generated), len(own)))
        return retrieval_ranks(generated, gallery, own)

    monkeypatch.setattr("ldm.evaluation.samples.retrieval_ranks", ranks)
    config = read(StageConfig, folder, **STAGE)
    recipe = partial(diffusion_recipe, pipelines={"TextPixelPipeline": TextPixelPipeline})
    with pytest.raises(ValueError, match="no pipeline samples a UNet2DConditionModel in space"):
        train(config, recipe, train_text2img.__file__)
    monkeypatch.setattr(kinds, "KINDS", [*kinds.KINDS, KIND])
    train(config, recipe, train_text2img.__file__)
    model = folder / "run" / "model"
    loaded = TextPixelPipeline.from_pretrained(model)
    draws = [torch.Generator().manual_seed(0)]
    assert np.isfinite(loaded(["red circle left"], 2, 1.0, draws).images).all()
    card = ModelCard.load(model / "README.md")
    assert "# Text to image" in card.text
    assert set(ranked) == {(1, 1)}, "of the two images that are sampled"
    assert "share of 1 validation captions" in card.text
    assert "A diffusion model in pixel space that samples images of 16 x 16 pixels from captions." in card.text
    assert (card.data.pipeline_tag, card.data.tags) == ("text-to-image", ["text-to-image", "pixel-diffusion"])
    assert Image.open(model / "samples.png").width > PIXELS
