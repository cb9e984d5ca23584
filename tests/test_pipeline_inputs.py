"""What the text-to-image pipeline refuses, with which words, and what it takes."""

import logging

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler

from pipelines.text2img import TextToImagePipeline
from tests import tiny_pipeline
from tests.tiny_pipeline import LENGTH, WIDTH, arrays, pipeline, seeds, text_encoder

from .table import table


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


UNUSABLE = {
    "guidance_scale nan": ({"guidance_scale": float("nan")}, "guidance_scale: got nan; expected a finite number >= 0"),
    "guidance_scale -3": ({"guidance_scale": -3}, "guidance_scale: got -3"),
    "guidance_scale inf": ({"guidance_scale": float("inf")}, "guidance_scale: got inf"),
    "guidance_scale text": ({"guidance_scale": "3"}, "guidance_scale: got '3'"),
    "steps 0": ({"steps": 0}, "num_inference_steps: got 0; expected a whole number from 1 to 1000"),
    "steps -1": ({"steps": -1}, "num_inference_steps: got -1"),
    "steps 1001": ({"steps": 1001}, "num_inference_steps: got 1001"),
    "steps text": ({"steps": "5"}, "num_inference_steps: got '5'"),
    "prompt []": ({"prompt": []}, "prompt: empty batch"),
    "prompt None": ({"prompt": None}, "give either prompt or prompt_embeds"),
    "prompt 5": ({"prompt": 5}, "prompt: got int; expected a string, or a list or tuple"),
    "prompt [None]": ({"prompt": ["a", None]}, "prompt: item 1 is NoneType"),
    "prompt surrogate": ({"prompt": "cat \ud83d"}, r"not valid Unicode: lone surrogate '\\ud83d' at character 4"),
    "images 0": ({"num_images_per_prompt": 0}, "num_images_per_prompt: got 0; expected a whole number >= 1"),
    "images -1": ({"num_images_per_prompt": -1}, "num_images_per_prompt: got -1"),
    "images True": ({"num_images_per_prompt": True}, "num_images_per_prompt: got True"),
    "height 0": ({"height": 0}, "height: got 0; expected a whole number >= 2"),
    "height -8": ({"height": -8}, "height: got -8"),
    "height 33": ({"height": 33}, "33 pixels is not a multiple of the autoencoder's factor 2; 32 and 34 are"),
    "height text": ({"height": "32"}, "height: got '32'"),
    "width 1": ({"width": 1}, "width: got 1"),
    "pixels": ({"height": 2**13, "width": 2**13}, "got 8192 . 8192 pixels; expected at most 16777216"),
    "output_type": ({"output_type": "bogus"}, "output_type: got 'bogus'; expected one of pil, np, pt, latent"),
    "generators": ({"generator": seeds(0, 1)}, "generator: got a list of 2 for 1 images"),
    "generator 5": ({"generator": 5}, "generator: got int; expected torch.Generator"),
    "negatives": ({"negative_prompt": ["a", "b"]}, "negative_prompt: got 2 for 1 prompts"),
    "negative 5": ({"negative_prompt": 5}, "negative_prompt: got int"),
    "negative []": ({"negative_prompt": []}, "negative_prompt: empty batch"),
    "both prompts": ({"prompt_embeds": torch.zeros(1, 4, WIDTH)}, "give either prompt or prompt_embeds, and not both"),
    "both negatives": (
        {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, LENGTH, WIDTH)},
        "give negative_prompt or negative_prompt_embeds, not both",
    ),
    "embeds width": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 4, 8)},
        "prompt_embeds has width 8, the denoiser expects 16: was it made by another text encoder",
    ),
    "embeds shape": ({"prompt": None, "prompt_embeds": torch.zeros(4, WIDTH)}, r"prompt_embeds: got \(4, 16\)"),
    "embeds type": ({"prompt": None, "prompt_embeds": [0.0]}, "prompt_embeds: got list"),
    "negative embeds": (
        {"negative_prompt_embeds": torch.zeros(1, 4, WIDTH)},
        "negative_prompt_embeds: got .1, 4, 16.; expected 1 prompts of 12 tokens",
    ),
    "latents shape": ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents: got \(1, 4, 4, 4\); .* shape \(1, 4, 8, 8\)"),
    "latents type": ({"latents": 0}, "latents: got int"),
    "tensor inputs": (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        "callback_on_step_end_tensor_inputs: got ..noise..; expected some of latents",
    ),
}


@table("case", UNUSABLE)
def test_unusable_inputs(pipe, case):
    call, message = UNUSABLE[case]
    with pytest.raises(ValueError, match=message):
        arrays(pipe, **call)


@table(
    "call",
    [
        {"prompt": ("a", "b")},
        {"prompt": ""},
        {"prompt": "nul \0, \u202eright to left\u202c, ねこ, 🐈\u200d⬛"},
        {"prompt": ["a", "b"], "negative_prompt": "for both"},
        {"guidance_scale": 1e6},
        {"steps": np.int64(2), "guidance_scale": np.float32(2)},
        {"height": 2, "width": 34},
        {"prompt": None, "prompt_embeds": torch.zeros(2, 7, WIDTH)},
    ],
)
def test_usable_inputs(pipe, call):
    images = arrays(pipe, **call)
    assert np.isfinite(images).all()
    assert images.shape[1:] == (call.get("height", 16), call.get("width", 16), 3)


def test_without_a_text_encoder_embeddings_are_needed():
    alone = pipeline(text_encoder=None, tokenizer=None)
    with pytest.raises(
        ValueError, match="prompt: the pipeline has no text encoder or no tokenizer; give prompt_embeds"
    ):
        alone("a")
    with pytest.raises(ValueError, match="give negative_prompt_embeds"):
        alone(prompt_embeds=torch.zeros(1, 4, WIDTH))


def test_a_tokenizer_that_pads_beyond_the_encoder_is_refused():
    tokenizer = tiny_pipeline.tokenizer()
    tokenizer.model_max_length = 77
    with pytest.raises(ValueError, match="the text encoder reads 12 tokens, not 77: set"):
        pipeline(tokenizer=tokenizer).encode_prompt("a")


def test_a_safety_checker_is_refused():
    with pytest.raises(ValueError, match="runs no safety checker"):
        TextToImagePipeline(**{**tiny_pipeline.parts(), "safety_checker": text_encoder()})


def test_pndm_with_runge_kutta_steps_needs_four():
    with pytest.raises(ValueError, match="num_inference_steps: got 3; expected a whole number from 4 to 1000"):
        arrays(pipeline(scheduler=PNDMScheduler()))


@table("prompt", ["x" * 100_000, ["x" * 50, "short"]])
def test_long_prompts_are_cut_with_one_short_warning(pipe, caplog, prompt):
    arrays(pipe, prompt, steps=1)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    tokens = 52 if isinstance(prompt, list) else 100_002
    assert record.getMessage() == f"prompt: {tokens} tokens, of which the text encoder reads 12; the rest is cut"


def test_a_prompt_that_just_fits_is_no_warning(pipe, caplog):
    arrays(pipe, "x" * (LENGTH - 2), steps=1)
    assert not caplog.records


UNUSABLE_TOO = {  # found by tests/fuzzing.py
    "guidance_scale huge": ({"guidance_scale": 10**400}, "guidance_scale: got 1000"),
    "guidance_scale 1e300": ({"guidance_scale": 1e300}, "guidance_scale: got 1e.300; .* at most 1e.06"),
    "steps of 5000 digits": ({"steps": 10**5000}, "num_inference_steps: got int; expected a whole number from 1"),
    "height of 5000 digits": ({"height": 10**5000}, "height . width: got int . 16 pixels"),
    "images 10**9": ({"num_images_per_prompt": 10**9}, "num_images_per_prompt: got 1000000000 .* at most 4096"),
    "latents nan": ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "latents: has values that are NaN, infinite"),
    "latents huge": ({"latents": torch.full((1, 4, 8, 8), 1e30)}, "latents: has values that are .* beyond 1e.06"),
    "latents inf, float16": (
        {"latents": torch.full((1, 4, 8, 8), float("inf"), dtype=torch.float16)},
        "latents: has values that are NaN, infinite",
    ),
    "latents complex": ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.complex64)}, "latents: got torch.complex64"),
    "latents of no numbers": ({"latents": torch.empty(1, 4, 8, 8, device="meta")}, "latents: got .* on meta"),
    "embeds inf": (
        {"prompt": None, "prompt_embeds": torch.full((1, 4, WIDTH), float("inf"))},
        "prompt_embeds: has values that are NaN, infinite",
    ),
    "embeds inf, float16": (  # in which 1e6 is infinite too
        {"prompt": None, "prompt_embeds": torch.full((1, 4, WIDTH), float("inf"), dtype=torch.float16)},
        "prompt_embeds: has values that are NaN, infinite",
    ),
    "embeds of one token": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 1, WIDTH)},
        "negative_prompt: 2 tokens at least, but prompt_embeds have 1; give negative_prompt_embeds too",
    ),
    "embeds of 40 tokens": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 40, WIDTH)},
        "negative_prompt: the text encoder reads 12 tokens, not 40: .* negative_prompt_embeds of their length",
    ),
    "embeds int": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 4, WIDTH).long()},
        "prompt_embeds: got torch.int64",
    ),
    "embeds of no tokens": ({"prompt": None, "prompt_embeds": torch.zeros(1, 0, WIDTH)}, r"prompt_embeds: got \(1, 0"),
    "output_type array": ({"output_type": np.array(["pil", "np"])}, "output_type: got array"),
    "output_type list": ({"output_type": ["np"]}, "output_type: got ..np..; expected one of"),
    "return_dict array": ({"return_dict": np.ones(2)}, "return_dict: got array.* expected True or False"),
    "callback 5": ({"callback_on_step_end": 5}, "callback_on_step_end: got 5; expected a function"),
    "tensor inputs None": ({"callback_on_step_end_tensor_inputs": None}, "tensor_inputs: got None; expected some of"),
    "tensor inputs text": ({"callback_on_step_end_tensor_inputs": "latents"}, "tensor_inputs: got 'latents'; expected"),
    "tensor inputs [[]]": ({"callback_on_step_end_tensor_inputs": [[]]}, "tensor_inputs: got ....; expected"),
}


@table("case", UNUSABLE_TOO)
def test_junk_is_refused_by_name_and_the_next_call_is_as_ever(pipe, case):
    usual = arrays(pipe)
    call, message = UNUSABLE_TOO[case]
    with pytest.raises(ValueError, match=message):
        arrays(pipe, **call)
    assert np.array_equal(arrays(pipe), usual)
