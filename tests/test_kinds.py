"""The kinds of pipelines: what a record says of the stock class is what that class does."""

import copy
import inspect
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image

from ldm.conditioners.low_res import LowResConditioner
from ldm.conditioners.text import KEYWORDS
from ldm.config import ObjectiveConfig, SamplerConfig
from ldm.export.kinds import KINDS, kind_of
from ldm.models.pipeline import plain_call
from ldm.models.scheduler import build_scheduler
from pipelines import PIPELINES
from tests import test_pixels_pipeline, tiny_pipeline

from .table import table
from .tiny_stages import IMAGEN

CLASSES = 3
TEXT = next(kind for kind in KINDS if kind.own == "TextToImagePipeline")
ASKED = {
    "prompt": {"prompt": ["a cat", "two"]},
    "class_labels": {"class_labels": [1, 2]},
    "batch_size": {"batch_size": 2},
}


def denoiser(kind, channels):
    """A tiny denoiser of a kind; with a learned variance it has twice the channels."""
    if kind.stock_length is not None:
        larger = {"in_channels": 6, "class_embed_type": "timestep"} if "low_res" in kind.conditions else {}
        keys = IMAGEN | {"sample_size": tiny_pipeline.PIXELS, "out_channels": channels * 3} | larger
        del keys["_class_name"]
        torch.manual_seed(3)
        return diffusers.UNet2DConditionModel(**keys).eval()
    if kind.space == "pixel":
        return test_pixels_pipeline.network(CLASSES if kind.conditions else None, out_channels=channels * 3)
    make = tiny_pipeline.unet if "unet" in kind.components else tiny_pipeline.transformer
    return make(out_channels=channels * 4)


def both_pipelines(kind, objective, sampler):
    """Our pipeline and the stock one, of the same random weights."""
    name = next(name for name, path in kind.components.items() if path == "model.denoiser")
    scheduler = build_scheduler(objective, sampler, clip_sample=kind.space == "pixel")
    made = tiny_pipeline.parts(scheduler=scheduler) | {"requires_safety_checker": False}
    made["image_noising_scheduler"] = LowResConditioner(8, 1000).noising_scheduler
    if kind.stock_length is not None:
        made["text_encoder"], made["tokenizer"].model_max_length = tiny_pipeline.text_encoder("t5"), kind.stock_length
        made |= dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    made[name] = denoiser(kind, 1 if objective.variational_weight is None else 2)
    for build in (PIPELINES[kind.own], getattr(diffusers, kind.stock)):
        takes = inspect.signature(build.__init__).parameters
        pipe = build(**copy.deepcopy({part: value for part, value in made.items() if part in takes}))
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def images(kind, pipe):
    guided = {"guidance_scale": 3.0} if "guidance_scale" in inspect.signature(pipe.__call__).parameters else {}
    call = {"generator": tiny_pipeline.seeds(0, 1), "num_inference_steps": 3, "output_type": "np"}
    if "low_res" in kind.conditions:
        call |= {"image": [Image.new("RGB", (8, 8), colour) for colour in ("red", "navy")], "noise_level": 100}
    return pipe(**ASKED[kind.asks], **plain_call(pipe), **guided, **call).images


@pytest.mark.slow
@table("kind", [kind for kind in KINDS if kind.stock], lambda value: getattr(value, "own", value))
@table("weight", [None, 1.0])
@table("sampler", ["dpm_solver", "ddim", "ddpm"])
def test_the_stock_class_makes_the_images_that_its_record_says(kind, weight, sampler):
    objective = ObjectiveConfig(path="scaled_linear", prediction_type="epsilon", variational_weight=weight)
    text = SimpleNamespace(max_length=kind.stock_length or tiny_pipeline.LENGTH, dtype=None)
    conditioners = SimpleNamespace(text=text if "text" in kind.conditions else None)
    config = SimpleNamespace(objective=objective, sampler=SamplerConfig(kind=sampler), conditioners=conditioners)
    said = kind.stock_images(config)
    ours, stock = both_pipelines(kind, objective, config.sampler)
    own, difference = images(kind, ours), None
    with nullcontext() if said != "none" else suppress(Exception):
        difference = np.abs(images(kind, stock) - own).max()
    assert (difference is not None and difference < 1e-4) == (said == "same"), difference


def test_a_stock_class_that_cannot_sample_a_stage_is_not_named():
    """It gives a float32 denoiser the type of the text encoder, and a VQModel arguments that it does not take."""
    text = SimpleNamespace(max_length=tiny_pipeline.LENGTH, dtype=None)
    config = SimpleNamespace(
        objective=ObjectiveConfig(), sampler=SamplerConfig(), conditioners=SimpleNamespace(text=text)
    )
    conditioner = SimpleNamespace(keywords=KEYWORDS)
    model = SimpleNamespace(
        denoiser=tiny_pipeline.unet(), conditioners={"text": conditioner}, conditioner=lambda name: conditioner
    )
    for autoencoder, said in ((tiny_pipeline.vae(), "same"), (VQModel(), "none")):
        kind = kind_of(SimpleNamespace(model=model, space=SimpleNamespace(autoencoder=autoencoder)), "latent")
        assert (kind.own, kind.stock_images(config)) == ("TextToImagePipeline", said)
    text.dtype = "bfloat16"
    assert TEXT.stock_images(config) == "none"


@table(
    ("wanted", "found", "fits"),
    [
        (KEYWORDS, dict(KEYWORDS), True),
        (["encoder_hidden_states"], dict(KEYWORDS), True),
        ({"encoder_hidden_states": "pooled"}, dict(KEYWORDS), False),
        (KEYWORDS, {**KEYWORDS, "encoder_attention_mask": "attention_mask"}, False),
        (["a", "b"], ("b", "a"), True),
        (["a"], ("b", "a"), False),
        (["a"], None, False),
    ],
)
def test_a_kind_fits_by_the_keywords_that_each_conditioner_sets(wanted, found, fits):
    conditioners = {} if found is None else {"text": SimpleNamespace(keywords=found)}
    model = SimpleNamespace(
        denoiser=tiny_pipeline.unet(), conditioners=conditioners, conditioner=lambda name: conditioners[name]
    )
    kind = replace(TEXT, conditions={"text": wanted})
    assert kind.fits(SimpleNamespace(model=model), "latent") is fits
