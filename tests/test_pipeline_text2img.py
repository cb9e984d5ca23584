"""The text-to-image pipeline: equal to the stock one, checked inputs, and folders that load without this project."""

import copy
import json
import logging
import multiprocessing
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import dynamic_modules_utils
from PIL import Image

from pipelines.text2img import TextToImagePipeline
from tests import tiny_pipeline
from tests.tiny_pipeline import LENGTH, WIDTH, pipeline, text_encoder, unet

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def arrays(pipe, prompt="a cat", steps=3, **changes):
    call = {"generator": seeds(0)[0], "num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "np"}
    return pipe(prompt, **call | changes).images


# Parity


@pytest.mark.parametrize(
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
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.prediction_type}",
)
def test_equal_to_the_stock_pipeline(scheduler):
    parts = tiny_pipeline.parts(scheduler=scheduler)
    call = {"prompt": ["a cat", "two"], "negative_prompt": ["", "blurred"], "num_images_per_prompt": 2}
    assert_equal_to_stock(parts, **call, height=24, width=8)


@pytest.mark.parametrize("kind", ["clip", "bert", "t5"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
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


# Inputs

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
    "generators": ({"generator": seeds(0, 1)}, "generator: got a list of 2 for 1 pictures"),
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


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_inputs(pipe, case):
    call, message = UNUSABLE[case]
    with pytest.raises(ValueError, match=message):
        arrays(pipe, **call)


@pytest.mark.parametrize(
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
    ids=str,
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


@pytest.mark.parametrize("prompt", ["x" * 100_000, ["x" * 50, "short"]], ids=["100k", "batch"])
def test_long_prompts_are_cut_with_one_short_warning(pipe, caplog, prompt):
    arrays(pipe, prompt, steps=1)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    counts = {"x" * 100_000: 100_002}.get(prompt if isinstance(prompt, str) else "", 52)
    assert record.getMessage() == f"prompt: {counts} tokens, of which the text encoder reads 12; the rest is cut"


# What a call does


@pytest.mark.parametrize(("guidance_scale", "pictures"), [(0.0, 2), (1.0, 2), (1.5, 4)])
def test_one_pass_a_step_without_guidance(guidance_scale, pictures):
    denoiser = unet()
    seen = []
    denoiser.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    arrays(pipeline(unet=denoiser), ["a", "b"], guidance_scale=guidance_scale)
    assert seen == [pictures] * 3


def test_item_of_a_batch_is_the_single_picture(pipe):
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
    (picture,) = arrays(pipe, output_type="pil")
    assert isinstance(picture, Image.Image)
    np.testing.assert_array_equal(np.asarray(picture), (expected[0] * 255).round())
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
    pictures = pipeline(text_encoder=None, tokenizer=None)
    embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    np.testing.assert_array_equal(
        arrays(pictures, None, **embeds), arrays(pipeline(), ["a cat", "two"], negative_prompt="no")
    )


def test_bfloat16_is_near_float32_and_keeps_float32_latents():
    half = pipeline().to(torch.bfloat16)
    assert arrays(half, output_type="latent").dtype == torch.float32
    assert half.encode_prompt("a")[0].dtype == torch.bfloat16
    assert np.abs(arrays(half) - arrays(pipeline())).mean() < 0.02  # 8 bits of mantissa


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


@pytest.mark.parametrize("scheduler", [PNDMScheduler(skip_prk_steps=True), UniPCMultistepScheduler(**FLOW)])
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


# Folders


class Absent:
    """An import hook that makes this project one that is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ldm", "pipelines", "tests"):
            raise ModuleNotFoundError(name)


def be_a_stranger(first, second):
    """Load, save and load again where this project cannot be imported; run in a forked process."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("ldm", "pipelines", "tests")]:
        del sys.modules[name]
    sys.meta_path.insert(0, Absent())
    os.chdir("/")
    cache = first.parent / "modules"
    dynamic_modules_utils.HF_MODULES_CACHE = str(cache)
    warnings.simplefilter("error", FutureWarning)
    stock = DiffusionPipeline.from_pretrained(first)
    assert type(stock) is StableDiffusionPipeline
    ours = DiffusionPipeline.from_pretrained(first, custom_pipeline=str(first), trust_remote_code=True)
    assert type(ours).__module__ == "diffusers_modules.local.pipeline"
    (written,) = cache.rglob("pipeline.py")
    written.write_text("another pipeline was loaded")
    ours.save_pretrained(second)
    again = DiffusionPipeline.from_pretrained(second, custom_pipeline="pipeline", trust_remote_code=True)
    assert type(again).__name__ == type(ours).__name__ == "TextToImagePipeline"
    for pipe in (stock, ours, again):
        pipe.set_progress_bar_config(disable=True)
    expected = arrays(stock)
    np.testing.assert_allclose(arrays(ours), expected, atol=1e-5)
    np.testing.assert_allclose(arrays(again), expected, atol=1e-5)
    np.save(second / "expected.npy", expected)
    assert "pipelines" not in sys.modules


def test_folder_loads_as_the_stock_pipeline_and_as_ours_without_this_project(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    pipe = pipeline(scheduler=DPMSolverMultistepScheduler(**FLOW))
    pipe.save_pretrained(first)
    stranger = multiprocessing.get_context("fork").Process(target=be_a_stranger, args=(first, second))
    stranger.start()
    stranger.join(120)
    assert stranger.exitcode == 0
    np.testing.assert_allclose(np.load(second / "expected.npy"), arrays(pipe), atol=1e-5)
    assert arrays(TextToImagePipeline.from_pretrained(second)).shape == (1, 16, 16, 3)
    for folder in (first, second):
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
        written = [file for file in folder.rglob("*") if file.suffix in (".json", ".py", ".txt")]
        assert len(written) > 6
        for file in written:
            text = file.read_text(encoding="utf-8")
            assert str(tmp_path) not in text, file
            assert file.suffix == ".py" or "_name_or_path" not in text, file
    assert (first / "pipeline.py").read_bytes() == (second / "pipeline.py").read_bytes()
