"""``ldm sample``: any pipeline of diffusers, and files that never take the place of others."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, UNet2DModel, VQModel
from PIL import Image

from ldm.commands.sample import sample
from ldm.models.pipeline import call_settings, image_size

from .table import table
from .tiny_pipeline import parts

SIZE = 8
BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}


def unet(**changes):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(sample_size=SIZE, **BLOCKS, **blocks, **changes)


def autoencoder(kind, **changes):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return kind(**BLOCKS, **blocks, **changes)


def class_transformer():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_embeds_ada_norm": 1000}
    return DiTTransformer2DModel(sample_size=SIZE, in_channels=4, out_channels=8, patch_size=2, **sizes)


STOCK = {
    "DDPMPipeline": lambda: (unet(), DDPMScheduler(20)),
    "DDIMPipeline": lambda: (unet(), DDIMScheduler(20)),
    "LDMPipeline": lambda: (autoencoder(VQModel, num_vq_embeddings=8), unet(), DDIMScheduler(20)),
    "ConsistencyModelPipeline": lambda: (unet(), diffusers.CMStochasticIterativeScheduler(20)),
    "DiTPipeline": lambda: (class_transformer(), autoencoder(AutoencoderKL, latent_channels=4), DDIMScheduler(20)),
    "StableDiffusionPipeline": parts,
}
"""Pipelines of diffusers that take a prompt, classes or nothing, guidance or none."""
GUIDED = {"DiTPipeline", "StableDiffusionPipeline"}


@table("name", STOCK)
def test_a_stock_pipeline_draws_and_is_given_the_settings_that_it_takes(name, tmp_path):
    torch.manual_seed(0)
    made = STOCK[name]()
    kind = getattr(diffusers, name)
    built = kind(**made) if isinstance(made, dict) else kind(*made)
    built.save_pretrained(tmp_path / "model")
    prompt = {"DiTPipeline": "3", "StableDiffusionPipeline": "a cat"}.get(name, "")
    (path,) = sample([prompt], str(tmp_path / "model"), str(tmp_path), num_inference_steps=2)
    drawn = Image.open(path)
    assert drawn.size == (image_size(built),) * 2
    settings = {"num_inference_steps": "2"} | ({"guidance_scale": "3.0"} if name in GUIDED else {})
    assert drawn.text == {"prompt": prompt, "negative_prompt": "", "seed": "0"} | settings
    for steps in (0, -1, 10**30, 2.5):
        with pytest.raises(ValueError, match=r"num_inference_steps: got .*; expected a whole number from 1 to"):
            call_settings(built, steps, None)
    if name in GUIDED:
        assert call_settings(built, 1, 2.0)["guidance_scale"] == 2.0
    else:
        assert "guidance_scale" not in call_settings(built, 1, 1.0)
        with pytest.raises(ValueError, match=f"guidance_scale: got 2.0; {name} has none; leave it out"):
            call_settings(built, 1, 2.0)
        with pytest.raises(ValueError, match=f"negative_prompt: {name} takes none"):
            sample([prompt], str(tmp_path / "model"), str(tmp_path), "x", num_inference_steps=2)
    for scale in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=f"guidance_scale: got {scale}; expected a finite number, 0 or more"):
            call_settings(built, 1, scale)


def test_no_file_takes_the_place_of_another_unless_that_is_said(tmp_path):
    model, out = str(tmp_path / "model"), tmp_path / "out"
    diffusers.StableDiffusionPipeline(**parts()).save_pretrained(model)
    call = {"out": str(out), "num_inference_steps": 1}
    first = sample(["猫", "犬と海", "!?", "a/b"], model, **call)
    assert [path.name for path in first] == ["猫-0.png", "犬と海-1.png", "cb4331df5ab2-2.png", "a-b-3.png"]
    before = {path: path.read_bytes() for path in first}
    (again,) = sample(["猫"], model, guidance_scale=9.0, **call)
    (third,) = sample(["猫"], model, **call)
    assert (again.name, third.name) == ("猫-0-2.png", "猫-0-3.png")
    assert Image.open(again).text["guidance_scale"] == "9.0"
    assert all(path.read_bytes() == content for path, content in before.items())
    (over,) = sample(["猫"], model, guidance_scale=9.0, overwrite=True, **call)
    assert over.name == "猫-0.png"
    assert over.read_bytes() == again.read_bytes()
    assert len(list(out.iterdir())) == 6
