"""The text-to-image pipeline: equal to the stock one, batches, outputs, callbacks, faults."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from pipelines.text2img import TextToImagePipeline
from tests import tiny_pipeline
from tests.tiny_pipeline import FLOW, LENGTH, WIDTH, arrays, pipeline, seeds, text_encoder, unet

from .table import table


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


# Parity


@table(
    "scheduler",
    [
        tiny_pipeline.scheduler(),
        tiny_pipeline.scheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
        DDPMScheduler(clip_sample=False),
        DDPMScheduler(),  # the stock class turns clip_sample off, and ours too
        PNDMScheduler(skip_prk_steps=True),
        HeunDiscreteScheduler(prediction_type="sample"),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", timestep_spacing="leading"),
        DPMSolverMultistepScheduler(**FLOW),
        UniPCMultistepScheduler(**FLOW),
    ],
)
def test_equal_to_the_stock_pipeline(scheduler):
    parts = tiny_pipeline.parts(scheduler=scheduler)
    call = {"prompt": ["a cat", "two"], "negative_prompt": ["", "blurred"], "num_images_per_prompt": 2}
    assert_equal_to_stock(parts, **call, height=24, width=8)


@table("kind", ["clip", "bert", "t5"])
@table("guidance_scale", [1.0, 3.0])
def test_equal_to_the_stock_pipeline_with_any_text_encoder(kind, guidance_scale):
    parts = tiny_pipeline.parts(text_encoder=text_encoder(kind))
    assert_equal_to_stock(parts, guidance_scale=guidance_scale)


def test_equal_to_the_stock_pipeline_with_pooled_text():
    parts = tiny_pipeline.parts(unet=unet(addition_embed_type="text", addition_embed_type_num_heads=2))
    assert_equal_to_stock(parts, width=8, height=24)


def test_equal_to_the_stock_pipeline_with_textual_inversion():
    parts = tiny_pipeline.parts()
    TextToImagePipeline(**parts).load_textual_inversion({"<cat>": torch.ones(2, WIDTH)})
    assert parts["tokenizer"]("<cat>_1").input_ids[1] == 515
    assert_equal_to_stock(parts, prompt="a <cat>", negative_prompt="<cat>")


def assert_equal_to_stock(parts, **call):
    ours, stock = TextToImagePipeline(**copy.copy(parts)), StableDiffusionPipeline(**parts)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(arrays(ours, **call), arrays(stock, **call), atol=1e-5)


def test_the_mask_reaches_only_encoders_that_ask_for_it():
    for kind, masked in (("clip", False), ("bert", True)):
        encoder = text_encoder(kind)
        seen = []
        encoder.register_forward_pre_hook(lambda _, args, kwargs, seen=seen: seen.append(kwargs), with_kwargs=True)
        pipeline(text_encoder=encoder).encode_prompt("a")
        assert all((kwargs["attention_mask"] is not None) == masked for kwargs in seen)


# What a call does


@table(("guidance_scale", "images"), [(0.0, 2), (1.0, 2), (1.5, 4)])
def test_one_pass_a_step_without_guidance(guidance_scale, images):
    denoiser = unet()
    seen = []
    denoiser.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    arrays(pipeline(unet=denoiser), ["a", "b"], guidance_scale=guidance_scale)
    assert seen == [images] * 3


def test_item_of_a_batch_is_the_single_image(pipe):
    prompts = ["a cat", "two", "III"]
    batch = arrays(pipe, prompts, num_images_per_prompt=2, generator=seeds(*range(6)))
    for index in (0, 3, 5):
        single = arrays(pipe, prompts[index // 2], generator=seeds(index))
        np.testing.assert_allclose(batch[index], single[0], atol=1e-5)


def test_latents_are_the_noise(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=seeds(0)[0])
    np.testing.assert_array_equal(arrays(pipe, latents=noise, generator=None), arrays(pipe))


def test_output_types_agree(pipe):
    expected = arrays(pipe)
    np.testing.assert_allclose(arrays(pipe, output_type="pt").permute(0, 2, 3, 1), expected)
    (image,) = arrays(pipe, output_type="pil")
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image), (expected[0] * 255).round())
    (as_tuple,) = pipe("a cat", 16, 16, 3, 3.0, generator=seeds(0)[0], output_type="np", return_dict=False)
    np.testing.assert_array_equal(as_tuple, expected)
    latents = arrays(pipe, output_type="latent")
    decoded = pipe.vae.decode(latents / 0.5, return_dict=False)[0] / 2 + 0.5
    np.testing.assert_allclose(decoded.clamp(0, 1).permute(0, 2, 3, 1).detach(), expected, atol=1e-6)


def test_prompts_encoded_apart():
    words = pipeline(unet=None, vae=None, scheduler=None)
    prompt_embeds, negative_prompt_embeds = words.encode_prompt(["a cat", "two"], negative_prompt="no")
    assert prompt_embeds.shape == negative_prompt_embeds.shape == (2, LENGTH, WIDTH)
    assert words.encode_prompt("a", num_images_per_prompt=3, do_classifier_free_guidance=False)[1] is None
    images = pipeline(text_encoder=None, tokenizer=None)
    embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    np.testing.assert_array_equal(
        arrays(images, None, **embeds), arrays(pipeline(), ["a cat", "two"], negative_prompt="no")
    )


def test_bfloat16_is_near_float32_and_keeps_float32_latents():
    """With a scheduler that gives back the type of the model output."""
    half, full = (pipeline(scheduler=EulerDiscreteScheduler()) for _ in range(2))
    half.to(torch.bfloat16)
    assert arrays(half, output_type="latent").dtype == torch.float32
    assert half.encode_prompt("a")[0].dtype == torch.bfloat16
    assert np.abs(arrays(half) - arrays(full)).mean() < 0.02  # 8 bits of mantissa


# Callbacks and faults


def test_callback_sees_and_replaces_tensors(pipe):
    seen = []

    def blank(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), pipe.num_timesteps, {name: len(tensors[name]) for name in tensors}))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    callback = {"callback_on_step_end": blank, "callback_on_step_end_tensor_inputs": names}
    assert not arrays(pipe, output_type="latent", **callback).any()
    sizes = {"latents": 1, "prompt_embeds": 2, "negative_prompt_embeds": 1}
    assert seen == [(step, timestep, 3, sizes) for step, timestep in enumerate((667, 334, 1))]


def test_official_callback_turns_guidance_off_as_in_the_stock_pipeline():
    assert_equal_to_stock(tiny_pipeline.parts(), callback_on_step_end=SDCFGCutoffCallback(0.5), steps=4)


@table("scheduler", [PNDMScheduler(skip_prk_steps=True), UniPCMultistepScheduler(**FLOW)])
def test_interrupted_and_failed_calls_leave_no_trace(scheduler):
    pipe = pipeline(scheduler=scheduler)
    expected, steps = arrays(pipe, steps=4), []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1

    def fail(pipe, step, timestep, tensors):
        raise KeyError(step)

    stopped = arrays(pipe, steps=4, callback_on_step_end=stop)
    assert steps == [0, 1]
    assert np.abs(stopped - expected).max() > 1e-3
    with pytest.raises(KeyError):
        arrays(pipe, steps=4, callback_on_step_end=fail)
    np.testing.assert_array_equal(arrays(pipe, steps=4), expected)


def test_non_finite_numbers_are_errors():
    pipe = pipeline()

    def poison(pipe, step, timestep, tensors):
        if step == 1:
            pipe.unet.conv_out.bias.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="non-finite latents at step 2 of 3"):
        arrays(pipe, callback_on_step_end=poison)
    pipe = pipeline()
    pipe.vae.decoder.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="non-finite pixels from the autoencoder"):
        arrays(pipe)
