"""From an image: image to image, inpainting, between two prompts; equal to the stock pipelines where there are any."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DModel,
    VQModel,
)
from PIL import Image, ImageDraw

from ldm.models.autoencoder import downsampling_factor, reconstruct
from pipelines.pixels import PixelPipeline
from pipelines.text2img import TextToImagePipeline
from tests import tiny_pipeline
from tests.tiny_pipeline import FLOW, PIXELS, arrays, pipeline, seeds, unet

from .table import table

SCHEDULERS = [
    tiny_pipeline.scheduler(timestep_spacing="trailing"),
    EulerDiscreteScheduler(),
    HeunDiscreteScheduler(),
    DPMSolverMultistepScheduler(),
    DPMSolverMultistepScheduler(**FLOW),
]
NOISY = [DDPMScheduler(clip_sample=False), DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")]


def photograph(seed=0, size=PIXELS):
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8))


def half(size=PIXELS):
    """White on the left, where it is drawn anew."""
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).rectangle((0, 0, size // 2 - 1, size), fill=255)
    return mask


def pixel_pipeline(**changes):
    torch.manual_seed(0)
    config = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    config |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipe = PixelPipeline(UNet2DModel(**config | changes).eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def name(scheduler):
    return f"{type(scheduler).__name__}-{scheduler.config.prediction_type}"


def both_draw(stock, scheduler, **call):
    parts = tiny_pipeline.parts(scheduler=scheduler)
    pipes = TextToImagePipeline(**copy.copy(parts)), stock(**parts)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return [arrays(pipe, steps=7, **call) for pipe in pipes]


@pytest.mark.slow
@table("scheduler", [*SCHEDULERS, *NOISY, PNDMScheduler(skip_prk_steps=True)], ids=name)
@table("strength", [0.3, 0.8, 1.0])
def test_image_to_image_is_the_stock_pipelines(scheduler, strength):
    call = {"prompt": "a cat", "negative_prompt": "bad", "num_images_per_prompt": 2}
    ours, stock = both_draw(StableDiffusionImg2ImgPipeline, scheduler, image=photograph(), strength=strength, **call)
    np.testing.assert_allclose(ours, stock, atol=1e-5)


def test_a_generator_and_an_image_for_each_image_is_the_stock_pipelines():
    call = {"prompt": ["a cat", "two"], "image": [photograph(1), photograph(2)], "generator": seeds(3, 4)}
    images = []
    for _ in range(2):
        call["generator"] = seeds(3, 4)
        images.append(arrays(pipeline(), steps=7, strength=0.5, **call))
    parts = tiny_pipeline.parts()
    stock = StableDiffusionImg2ImgPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    call["generator"] = seeds(3, 4)
    np.testing.assert_allclose(images[0], arrays(stock, steps=7, strength=0.5, **call), atol=1e-5)
    np.testing.assert_array_equal(*images)


@table("scheduler", SCHEDULERS, ids=name)
@table("strength", [0.5, 1.0])
def test_inpainting_is_the_stock_pipelines(scheduler, strength):
    call = {"prompt": "a cat", "image": photograph(), "mask_image": half(), "strength": strength}
    ours, stock = both_draw(StableDiffusionInpaintPipeline, scheduler, height=PIXELS, width=PIXELS, **call)
    np.testing.assert_allclose(ours, stock, atol=1e-5)


@table("scheduler", [*SCHEDULERS, *NOISY], ids=name)
def test_what_the_mask_keeps_is_the_image_to_the_bit(scheduler):
    pipe = pipeline(scheduler=scheduler)
    call = {"image": photograph(), "mask_image": half(), "generator": seeds(0)[0], "output_type": "latent"}
    drawn = arrays(pipe, steps=7, **call)
    pixel_values = pipe.image_processor.preprocess(photograph())
    kept = 0.5 * pipe.vae.encode(pixel_values).latent_dist.sample(seeds(0)[0])
    assert torch.equal(drawn[..., 4:], kept[..., 4:])
    assert not torch.isclose(drawn[..., :4], kept[..., :4], atol=1e-3).any()


def test_less_strength_takes_fewer_steps_and_stays_nearer():
    pipe, seen, distance = pipeline(), [], []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(1))
    pixel_values = pipe.image_processor.preprocess(photograph())
    x0 = 0.5 * pipe.vae.encode(pixel_values).latent_dist.mode().detach()
    for strength in (0.2, 0.5, 1.0):
        before = len(seen)
        latents = arrays(pipe, steps=10, image=photograph(), strength=strength, output_type="latent")
        assert (len(seen) - before, pipe.num_timesteps) == (10 * strength, 10 * strength)
        distance.append(float((latents - x0).square().mean()))
    assert distance == sorted(distance)


def floats(height=24, width=20, *shape):
    return np.random.default_rng(1).random((*shape, height, width, 3), dtype=np.float32)


def tensors(height=24, width=20, *shape):
    return torch.from_numpy(floats(height, width, *shape)).movedim(-1, -3)


KINDS = {
    "wide": photograph().resize((40, 24)),
    "not whole latents": photograph().resize((21, 15)),
    "PIL of two sizes": [photograph().resize((24, 20)), photograph(2)],
    "array": floats(),
    "arrays": floats(24, 20, 2),
    "list of arrays": [floats(), floats()],
    "turned around": floats()[:, ::-1, ::-1],
    "array of doubles": floats().astype(np.float64),
    "tensor": tensors(),
    "tensors": tensors(24, 20, 2),
    "list of tensors": [tensors(), tensors()],
    "odd size": tensors(25, 31),
    "from -1 on": 2 * tensors() - 1,
    "latents": torch.randn(1, 4, 10, 12, generator=seeds(1)[0]),
}


@table("kind", KINDS)
def test_every_kind_of_image_of_every_size_is_the_stock_pipelines(kind):
    call = {"image": KINDS[kind], "strength": 0.5, "prompt": ["a cat", "two"]}
    ours, stock = both_draw(StableDiffusionImg2ImgPipeline, tiny_pipeline.scheduler(), **call)
    np.testing.assert_allclose(ours, stock, atol=1e-5)


MASK = (np.random.default_rng(3).random((24, 20)) > 0.5).astype(np.float32)
MASKS = {
    "array": MASK,
    "array with an axis": MASK[..., None],
    "arrays": MASK[None, ..., None],
    "tensor": torch.from_numpy(MASK),
    "tensor with an axis": torch.from_numpy(MASK)[None],
    "tensors": torch.from_numpy(MASK)[None, None],
    "list": [torch.from_numpy(MASK)],
    "PIL": Image.fromarray((MASK * 255).astype(np.uint8)),
    "PIL of another size": half(),
}


@table("kind", MASKS)
def test_every_kind_of_mask_is_the_stock_pipelines(kind):
    call = {"prompt": "a cat", "image": floats(), "mask_image": MASKS[kind]}
    sizes = {"height": 24, "width": 20}  # the stock class makes a square of the image, unless it is told both
    parts = tiny_pipeline.parts()
    stock = StableDiffusionInpaintPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(arrays(pipeline(), **call), arrays(stock, **call, **sizes), atol=1e-5)


def test_an_image_keeps_its_size_unless_another_is_said(caplog):
    pipe, image = pipeline(), photograph(size=24)
    call = {"image": image, "strength": 0.5}
    for more in ({}, {"mask_image": half()}):
        assert arrays(pipe, **call, **more).shape == (1, 24, 24, 3)
        assert arrays(pipe, **call, **more, height=16, width=8).shape == (1, 16, 8, 3)
        assert arrays(pipe, **call, **more, width=8).shape == (1, 24, 8, 3)
    assert not caplog.records
    arrays(pipe, image=image.resize((40, 28)), strength=0.5, steps=2)
    arrays(pipe, image=image.resize((40, 28)), strength=0.5, steps=2, height=28, width=40)  # said: no warning
    (record,) = caplog.records
    assert record.getMessage().startswith("image: 28 x 40 pixels are drawn by a model of 16 x 16; give height")
    with pytest.raises(ValueError, match="image: got 1 x 24 pixels; expected at least 2 x 2"):
        arrays(pipe, image=image.resize((24, 1)))
    with pytest.raises(
        ValueError, match=r"image: latents of .10, 12., but height and width are of .4, 4. latents; leave them out"
    ):
        arrays(pipe, image=KINDS["latents"], height=8, width=8)


def test_latents_of_any_number_of_channels_are_x0_as_they_are():
    x0 = torch.randn(1, 8, 10, 6, generator=seeds(1)[0])
    pipe = pipeline(vae=None, unet=unet(in_channels=8, out_channels=8))
    mask = torch.zeros(20, 12)
    drawn = arrays(pipe, image=x0, mask_image=mask, output_type="latent")
    torch.testing.assert_close(drawn, x0)


def test_transparent_parts_of_an_image_are_white():
    transparent = Image.new("RGBA", (PIXELS, PIXELS), (0, 0, 0, 0))
    white = Image.new("RGB", (PIXELS, PIXELS), "white")
    expected = arrays(pipeline(), image=white, strength=0.5)
    np.testing.assert_array_equal(arrays(pipeline(), image=transparent, strength=0.5), expected)


def tiny_autoencoder():
    torch.manual_seed(3)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 4}
    return AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()


def quantised():
    torch.manual_seed(3)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 16}
    return VQModel(down_block_types=down, up_block_types=up, **sizes).eval()


def lopsided():
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"down_block_out_channels": (4, 8), "up_block_out_channels": (8, 16), "norm_num_groups": 4}
    return AsymmetricAutoencoderKL(**blocks, **sizes, latent_channels=4).eval()


@table("make", [tiny_autoencoder, quantised, lopsided])
def test_any_autoencoder_starts_from_an_image_as_in_the_stock_pipeline(make):
    parts = tiny_pipeline.parts(vae=make())
    stock = StableDiffusionImg2ImgPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    for output_type in ("latent",) if make is quantised else ("latent", "np"):  # which the stock class cannot decode
        call = {"image": photograph(size=24), "strength": 0.5, "output_type": output_type}
        np.testing.assert_allclose(arrays(pipeline(vae=parts["vae"]), **call), arrays(stock, **call), atol=1e-5)
    drawn = arrays(pipeline(vae=parts["vae"]), image=photograph(size=24), mask_image=half())
    assert drawn.shape == (1, 24, 24, 3)
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    assert reconstruct(parts["vae"], pixel_values).shape == pixel_values.shape
    assert downsampling_factor(parts["vae"]) == 2


def test_left_out_the_strength_is_the_stock_pipelines():
    for more, strength in (({}, 0.8), ({"mask_image": half()}, 1.0)):
        call = {"image": photograph(), "steps": 10, **more}
        np.testing.assert_array_equal(arrays(pipeline(), **call), arrays(pipeline(), strength=strength, **call))
    pipe, call = pixel_pipeline(), {"num_inference_steps": 10, "output_type": "pt", "image": photograph(size=8)}
    drawn, expected = (pipe(generator=seeds(0)[0], **call, **more).images for more in ({}, {"strength": 0.8}))
    assert torch.equal(drawn, expected)


def test_a_mask_painted_on_transparency_is_white_where_it_is_painted():
    painted = Image.new("RGBA", (PIXELS, PIXELS), (0, 0, 0, 0))
    painted.paste("white", (0, 0, PIXELS // 2, PIXELS))
    expected = arrays(pipeline(), image=photograph(), mask_image=half())
    np.testing.assert_array_equal(arrays(pipeline(), image=photograph(), mask_image=painted), expected)


@table("images", [1, 2, 4])
def test_one_image_for_all_for_a_prompt_or_for_an_image(images):
    sources = [photograph(seed) for seed in range(images)]
    call = {"prompt": ["a cat", "two"], "num_images_per_prompt": 2, "image": sources, "strength": 0.5}
    drawn = arrays(pipeline(), **call, generator=seeds(0, 1, 2, 3))
    for number, prompt in enumerate(("a cat", "a cat", "two", "two")):
        source = sources[number * images // 4]
        alone = arrays(pipeline(), prompt, image=source, strength=0.5, generator=seeds(number))
        np.testing.assert_allclose(drawn[number], alone[0], atol=1e-5)


def test_an_image_needs_an_autoencoder():
    with pytest.raises(ValueError, match="image: the pipeline has no autoencoder"):
        arrays(pipeline(vae=None), image=torch.zeros(1, 3, 32, 32), output_type="latent")


def test_a_sampler_that_begins_at_the_highest_noise_starts_from_no_image():
    call = {"steps": 10, "image": photograph()}
    with pytest.raises(ValueError, match=r"strength: PNDMScheduler takes its first steps .* skip_prk_steps=True"):
        arrays(pipeline(scheduler=PNDMScheduler()), **call)
    assert np.isfinite(arrays(pipeline(scheduler=PNDMScheduler()), **call, strength=1.0)).all()
    with pytest.raises(ValueError, match="of 10 steps is less than one"):  # it has one timestep more than steps
        arrays(pipeline(scheduler=PNDMScheduler(skip_prk_steps=True)), **call, strength=0.05)


def test_pixels_keep_the_size_of_an_image_too():
    pipe, call = pixel_pipeline(), {"num_inference_steps": 2, "output_type": "pt"}
    image = photograph(size=8).resize((15, 12))
    assert pipe(image=image, strength=0.5, **call).images.shape == (1, 3, 12, 14)
    assert pipe(image=image, strength=0.5, height=6, width=8, **call).images.shape == (1, 3, 6, 8)
    assert pipe(height=10, **call).images.shape == (1, 3, 10, 8)
    with pytest.raises(ValueError, match="height: 9 pixels is not a multiple of 2, by which the denoiser divides it"):
        pipe(height=9, **call)


@table("classes", [{}, {"num_class_embeds": 3}])
def test_pixels_start_from_an_image_too(classes):
    pipe = pixel_pipeline(**classes)
    call = {"batch_size": 2, "num_inference_steps": 10, "output_type": "pt"}
    mask = half(8)
    drawn = pipe(image=photograph(size=8), mask_image=mask, generator=seeds(0, 1), **call).images
    true = torch.from_numpy(np.asarray(photograph(size=8)) / 255).permute(2, 0, 1).float()
    torch.testing.assert_close(drawn[..., 4:], true[..., 4:].expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    call |= {"image": photograph(size=8)}
    near, far = (pipe(strength=share, generator=seeds(0, 1), **call).images for share in (0.1, 1.0))
    assert (near - true).abs().mean() < (far - true).abs().mean() / 2


@table(
    ("call", "message"),
    [
        ({"image": photograph(), "strength": 0.0}, "strength: got 0.0; expected a number above 0, and at most 1"),
        ({"image": photograph(), "strength": 1.5}, "strength: got 1.5"),
        ({"image": photograph(), "strength": "much"}, "strength: got 'much'"),
        ({"image": photograph(), "strength": 0.2}, "strength: 0.2 of 3 steps is less than one; use more num_inference"),
        ({"strength": 0.5}, "strength: given without an image; give image too"),
        ({"mask_image": half()}, "mask_image: given without an image"),
        ({"image": "cat.png"}, "image: got str; expected an image of PIL, an array, a tensor, or a list of one of"),
        ({"image": []}, "image: got an empty list"),
        ({"image": [photograph(), torch.zeros(3, 16, 16)]}, "image: got list; expected an image of PIL, an array"),
        ({"image": np.zeros((16, 16, 3), np.uint8)}, r"image: got uint8 of shape \(16, 16, 3\); expected floats in"),
        ({"image": np.zeros((16, 16))}, r"image: got float64 of shape .16, 16.; .* \(N, height, width, 3\), or PIL"),
        ({"image": np.zeros((16, 16, 4), np.float32)}, r"image: got float32 of shape \(16, 16, 4\)"),
        ({"image": [torch.zeros(3, 16, 16), torch.zeros(3, 16, 8)]}, "expected one size"),
        ({"image": photograph(), "mask_image": -torch.ones(16, 16)}, r"mask_image: .* expected floats in \[0, 1\]"),
        ({"image": [photograph()] * 2}, "image: got 2 for 1 images; expected one, or one a prompt"),
        ({"image": [photograph()] * 2, "prompt": ["a"] * 3, "num_images_per_prompt": 2}, "image: got 2 for 6 images"),
        ({"image": photograph().convert("I")}, "image: got an image of mode I; expected 8 bits, such as RGB"),
        ({"image": photograph(), "mask_image": half().convert("F")}, "mask_image: got an image of mode F"),
        ({"strength": 1.0}, "strength: given without an image"),
        (
            {"image": torch.zeros(1, 5, 16, 16)},
            r"image: got torch.float32 of shape \(1, 5, 16, 16\); expected",
        ),
        ({"image": torch.full((1, 3, 16, 16), 255.0)}, r"expected floats in \[0, 1\] of shape \(N, 3, height"),
        ({"image": torch.full((1, 3, 16, 16), float("nan"))}, r"expected floats in \[0, 1\]"),
        ({"image": photograph(), "mask_image": torch.zeros(1, 3, 16, 16)}, r"mask_image: .* shape \(N, 1, height"),
        ({"image": photograph(), "mask_image": 1}, "mask_image: got int"),
    ],
)
def test_unusable_images_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        arrays(pipeline(), **call)


def test_between_two_prompts():
    pipe = pipeline()
    noise = torch.randn(1, 4, 8, 8, generator=seeds(5)[0])
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    between = pipe.interpolate("a cat", "two", 5, latents=noise, **call).images
    ends = [arrays(pipe, prompt, latents=noise, generator=None) for prompt in ("a cat", "two")]
    np.testing.assert_allclose(between[[0, -1]], np.concatenate(ends), atol=1e-5)
    steps = np.abs(np.diff(between, axis=0)).mean((1, 2, 3))
    assert (steps > 0).all()
    assert steps.max() < np.abs(ends[0] - ends[1]).mean()
    drawn = pipe.interpolate("a cat", "two", 2, generator=seeds(0)[0], **call).images
    np.testing.assert_allclose(drawn[0], arrays(pipe)[0], atol=1e-5)
    with pytest.raises(ValueError, match="num_images: got 1; expected a whole number from 2 to"):
        pipe.interpolate("a cat", "two", 1)
    for latents in (noise.expand(2, -1, -1, -1), noise[0], "noise"):
        with pytest.raises(ValueError, match=r"latents: got .* expected a tensor of shape \(5, 4, 8, 8\)"):
            pipe.interpolate("a cat", "two", 5, latents=latents, **call)


@table("scheduler", NOISY, ids=name)
def test_between_two_prompts_all_is_drawn_of_one_noise_also_on_the_way_and_of_an_image(scheduler):
    pipe = pipeline(scheduler=scheduler)
    call = {"num_inference_steps": 4, "output_type": "np", "image": photograph(), "strength": 0.5}
    same = pipe.interpolate("a cat", "a cat", 3, **call).images  # of any noise
    np.testing.assert_allclose(same, same[[0, 0, 0]], atol=1e-5)
    for generator in (seeds(0)[0], seeds(0)):
        first = pipe.interpolate("a cat", "two", 2, generator=generator, **call).images[0]
        np.testing.assert_allclose(first, pipe("a cat", generator=seeds(0)[0], **call).images[0], atol=1e-5)
    torch.manual_seed(5)
    drawn = pipe.interpolate("a cat", "two", 2, **call).images
    torch.manual_seed(5)
    np.testing.assert_array_equal(pipe.interpolate("a cat", "two", 2, **call).images, drawn)
    generator = seeds(0)[0]
    once, again = (pipe.interpolate("a cat", "two", 2, generator=generator, **call).images for _ in range(2))
    assert not np.allclose(once, again, atol=1e-3)
