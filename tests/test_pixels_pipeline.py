"""Images from noise and of classes: as the stock pipelines draw them, and by a loop written out."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)

from pipelines.pixels import PixelPipeline

from . import tiny_pipeline
from .table import table

SIZE, CLASSES, STEPS = 8, 3, 12


def network(classes=None, **changes):
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    embeds = None if classes is None else classes + 1
    sizes = {"sample_size": SIZE, "block_out_channels": (16, 16), "norm_num_groups": 8, "layers_per_block": 1}
    return UNet2DModel(**sizes, **blocks, num_class_embeds=embeds, **changes).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawing(classes=None, scheduler=None, **changes):
    return quiet(PixelPipeline(network(classes, **changes), scheduler or DDPMScheduler(num_train_timesteps=STEPS)))


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def arrays(pipe, **call):
    return pipe(generator=seeded(), num_inference_steps=STEPS, output_type="np", **call).images


@table("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_it_draws_as_the_stock_ddpm_pipeline(variance):
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, variance_type=variance)
    ours = drawing(scheduler=scheduler, out_channels=6 if variance == "learned_range" else 3)
    stock = quiet(DDPMPipeline(ours.unet, scheduler))
    np.testing.assert_allclose(arrays(ours, batch_size=3), arrays(stock, batch_size=3), atol=1e-6)


@table("limit", [{"clip_sample": True}, {"clip_sample": False}, {"thresholding": True}])
@table("eta", [0.0, 0.5])
def test_it_draws_as_the_stock_ddim_pipeline_with_the_noise_of_the_clipped_image(limit, eta):
    ours = drawing(scheduler=DDIMScheduler(num_train_timesteps=STEPS, **{"clip_sample": False} | limit))
    stock = quiet(DDIMPipeline(ours.unet, ours.scheduler))
    call = {"batch_size": 2, "eta": eta}
    expected = arrays(stock, **call, use_clipped_model_output=True)
    np.testing.assert_allclose(arrays(ours, **call), expected, atol=1e-6)
    plain = np.abs(expected - arrays(stock, **call)).max()
    assert (plain > 1e-3) == any(limit.values())  # without a limit it is all the same


def test_where_x0_is_clipped_the_noise_leads_from_it_to_x_t():
    """The step of guided-diffusion: alpha' x0 + sigma' (x_t - alpha x0) / sigma, of the clipped x0."""
    pipe = drawing(scheduler=DDIMScheduler(num_train_timesteps=STEPS))
    x_t = torch.randn(1, 3, SIZE, SIZE, generator=seeded())
    squared = torch.cat([pipe.scheduler.alphas_cumprod, torch.ones(1)])  # the last, at -1, is x0 itself
    with torch.no_grad():
        for t in reversed(range(STEPS)):
            noise = pipe.unet(x_t, t).sample
            x0 = ((x_t - (1 - squared[t]).sqrt() * noise) / squared[t].sqrt()).clamp(-1, 1)
            noise = (x_t - squared[t].sqrt() * x0) / (1 - squared[t]).sqrt()
            x_t = squared[t - 1].sqrt() * x0 + (1 - squared[t - 1]).sqrt() * noise
    found = pipe(generator=seeded(), num_inference_steps=STEPS, output_type="latent").images
    torch.testing.assert_close(found, x_t, rtol=1e-4, atol=1e-5)


def test_a_class_is_drawn_with_guidance_away_from_the_null():
    """x_{t-1} of the scheduler, from null + 2 (class - null)."""
    pipe = drawing(CLASSES, DDIMScheduler(num_train_timesteps=STEPS, clip_sample=False))
    x_t = torch.randn(2, 3, SIZE, SIZE, generator=seeded())
    labels, nulls = torch.tensor([2, 0]), torch.full((2,), CLASSES)
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            null, given = (pipe.unet(x_t, t, class_labels=told).sample for told in (nulls, labels))
            x_t = pipe.scheduler.step(null + 2 * (given - null), t, x_t).prev_sample
    found = pipe(class_labels=[2, 0], guidance_scale=2.0, generator=seeded(), num_inference_steps=STEPS,
                 output_type="latent").images  # fmt: skip
    torch.testing.assert_close(found, x_t, rtol=1e-4, atol=1e-5)


def test_without_classes_guidance_costs_nothing_and_changes_nothing():
    pipe, seen = drawing(), []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    np.testing.assert_array_equal(arrays(pipe, guidance_scale=3.0), arrays(pipe))
    assert set(seen) == {1}


def test_no_class_is_the_null():
    pipe = drawing(CLASSES)
    null = pipe.unet.class_embedding.weight[CLASSES]
    before = arrays(pipe, class_labels=[None, 1])
    with torch.no_grad():
        null += 1
    after = arrays(pipe, class_labels=[None, 1])
    assert abs(after[0] - before[0]).max() > 1e-3
    np.testing.assert_array_equal(after[1], before[1])


def test_image_i_is_that_of_generator_i_whatever_the_batch():
    pipe = drawing(CLASSES)
    call = {"num_inference_steps": STEPS, "output_type": "np"}
    together = pipe(class_labels=[0, 1, None], generator=[seeded(i) for i in range(3)], **call).images
    alone = pipe(class_labels=1, generator=[seeded(1)], **call).images
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5)


def test_a_callback_sees_every_step_changes_images_and_stops():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        pipe._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = drawing()(num_inference_steps=STEPS, output_type="latent", callback_on_step_end=callback).images
    assert seen == [(0, STEPS - 1), (1, STEPS - 2), (2, STEPS - 3)]
    assert not images.any()


def test_what_is_saved_is_the_stock_pipeline_and_ours(tmp_path):
    pipe = drawing()
    expected = arrays(pipe)
    pipe.save_pretrained(tmp_path)
    stock = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    ours = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    assert (type(stock).__name__, type(ours).__name__) == ("DDPMPipeline", "PixelPipeline")
    for loaded in (stock, quiet(ours)):
        np.testing.assert_allclose(arrays(loaded), expected, atol=1e-6)


def test_folders_of_both_kinds_are_loaded_in_turn(tmp_path):
    """Diffusers runs both in one module."""
    drawing().save_pretrained(tmp_path / "pixels")
    tiny_pipeline.pipeline(scheduler=DPMSolverMultistepScheduler(**tiny_pipeline.FLOW)).save_pretrained(
        tmp_path / "text"
    )
    for name in ("pixels", "text", "pixels"):
        folder = tmp_path / name
        loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
        assert type(loaded).__name__ == {"pixels": "PixelPipeline", "text": "TextToImagePipeline"}[name]


@table(
    ("call", "words"),
    [
        ({"class_labels": [3]}, "class_labels: got 3; expected a whole number from 0 to 2"),
        ({"class_labels": [-1]}, "class_labels: got -1; expected"),
        ({"class_labels": ["cat"]}, "class_labels: got 'cat'; expected"),
        ({"class_labels": []}, "class_labels: got 0; expected 1 to 4096"),
        ({"batch_size": 0}, "batch_size: got 0; expected"),
        ({"batch_size": 10**6}, "batch_size: got 1000000; expected"),
        ({"num_inference_steps": 13}, "num_inference_steps: got 13; expected a whole number from 1 to 12"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan; expected"),
        ({"output_type": "jpeg"}, "output_type: got 'jpeg'; expected one of"),
        ({"generator": [seeded()], "batch_size": 2}, "generator: got a list of 1 for 2 images"),
        ({"callback_on_step_end": 3}, "callback_on_step_end: got 3; expected a function"),
    ],
)
def test_what_cannot_be_drawn_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        drawing(CLASSES)(**{"num_inference_steps": 2} | call)


def test_a_denoiser_without_classes_is_asked_for_none():
    with pytest.raises(ValueError, match="knows no classes"):
        drawing()(class_labels=[0], num_inference_steps=2)
