"""Text to image with a transformer: equal to the stock pipeline of its layout, padding, what is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PixArtAlphaPipeline

from ldm.models.pipeline import plain_call
from pipelines.transformer import TransformerPipeline
from tests import tiny_pipeline
from tests.tiny_pipeline import FLOW, LENGTH, arrays, seeds, text_encoder, tokenizer, transformer

from .table import table

STOCK = {"use_resolution_binning": False, "max_sequence_length": LENGTH, "clean_caption": False}


def parts(**changes):
    made = tiny_pipeline.parts(**changes)
    chosen = {name: made[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return {**chosen, "transformer": changes.get("transformer") or transformer()}


def pipeline(**changes):
    pipe = TransformerPipeline(**parts(**changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@table("guidance_scale", [1.0, 3.0])
@table("kind", ["clip", "bert"])
def test_equal_to_the_stock_pipeline(kind, guidance_scale):
    made = parts(text_encoder=text_encoder(kind), scheduler=DPMSolverMultistepScheduler(**FLOW))
    ours, stock = TransformerPipeline(**made), PixArtAlphaPipeline(**made)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    call = {"prompt": ["a cat", "a longer one"], "negative_prompt": ["", "bad"], "num_images_per_prompt": 2}
    call |= {"guidance_scale": guidance_scale, "height": 24, "width": 8}
    np.testing.assert_allclose(arrays(ours, **call), arrays(stock, **call, **STOCK), atol=1e-5)


def test_a_saved_folder_is_read_by_both(tmp_path):
    ours = pipeline(scheduler=DPMSolverMultistepScheduler(**FLOW))
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "PixArtAlphaPipeline"
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    own = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    assert [type(pipe).__name__ for pipe in (stock, own)] == ["PixArtAlphaPipeline", "TransformerPipeline"]
    np.testing.assert_allclose(arrays(own), arrays(ours), atol=1e-6)
    assert plain_call(stock) == STOCK
    assert plain_call(ours) == {}
    np.testing.assert_allclose(arrays(stock, **STOCK), arrays(ours), atol=1e-5)


def test_what_stands_at_padding_is_not_seen():
    pipe = pipeline()
    embeds = pipe.encode_prompt("a cat", None, 1, False)[0]
    tokens = int(tokenizer()("a cat", return_tensors="pt").attention_mask.sum())
    assert embeds[0, :tokens].abs().amin() > 0
    assert not embeds[0, tokens:].any()
    assert pipe.conditions(embeds)["encoder_attention_mask"].tolist() == [[True] * tokens + [False] * (LENGTH - tokens)]
    cut = arrays(pipe, None, prompt_embeds=embeds[:, :tokens], guidance_scale=1.0)
    np.testing.assert_allclose(cut, arrays(pipe, guidance_scale=1.0), atol=1e-5)
    assert not np.allclose(cut, arrays(pipe, "a dog", guidance_scale=1.0), atol=1e-5)


@table("size", [{"height": 18}, {"width": 2}])
def test_sizes_are_whole_patches(size):
    pipe = pipeline(transformer=transformer(patch_size=2))
    assert arrays(pipe, height=20, width=4).shape == (1, 20, 4, 3)
    with pytest.raises(
        ValueError, match=r"multiple of 4, the autoencoder's factor times the denoiser.s patch; 16|>= 4"
    ):
        arrays(pipe, **size)


def test_between_two_prompts():
    pipe = pipeline()
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np", "generator": seeds(0)[0]}
    between = pipe.interpolate("a cat", "a longer one", 3, **call).images
    np.testing.assert_allclose(between[0], arrays(pipe)[0], atol=1e-5)
    np.testing.assert_allclose(between[2], arrays(pipe, "a longer one")[0], atol=1e-5)


def test_a_transformer_that_wants_sizes_is_refused():
    with pytest.raises(ValueError, match="use_additional_conditions=False"):
        pipeline(transformer=transformer(use_additional_conditions=True))


def test_one_more_prompt_in_the_batch_changes_no_image():
    pipe = pipeline()
    batch = arrays(pipe, ["a cat", "something much longer"], generator=seeds(0, 1))
    np.testing.assert_allclose(batch[0], arrays(pipe, "a cat", generator=seeds(0))[0], atol=1e-5)


def test_it_is_drawn_on_a_device_in_half_precision():
    pipe = pipeline().to(torch.bfloat16)
    assert np.isfinite(arrays(pipe)).all()
