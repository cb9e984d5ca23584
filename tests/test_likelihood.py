"""Bits per dimension: against the bound written out in float64 from the papers' equations, and against known data."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from ldm.config import ObjectiveConfig
from ldm.evaluation.likelihood import bound_section, independent_bits, variational_bound
from ldm.models.scheduler import build_scheduler
from ldm.objectives.schedule import build_schedule
from pipelines.pixels import PixelPipeline
from tests.tiny_pipeline import pipeline as latent_pipeline

from .table import table

STEPS = 12
BLOCKS = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
CONFIG = ObjectiveConfig("linear", num_train_timesteps=STEPS + 21)
KINDS = ["fixed_small", "fixed_large", "learned_range"]


def random_images(count=3, size=4):
    draw = torch.Generator().manual_seed(5)
    return torch.randint(256, (count, 3, size, size), generator=draw) / 127.5 - 1


def drawing(kind="fixed_small", classes=None, **more):
    torch.manual_seed(0)
    channels = 6 if kind == "learned_range" else 3
    unet = UNet2DModel(
        sample_size=4, in_channels=3, out_channels=channels, norm_num_groups=8, num_class_embeds=classes, **BLOCKS
    )
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_end=0.3, variance_type=kind, **more)
    return PixelPipeline(unet, scheduler)


normal_below = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))


def written_out(pipe, x0, seed):
    """Every term of one image, (T + 1,), float64: Ho et al. 2020, eq. 5 to 8 and 13; N. & D. 2021, eq. 15."""
    kind, clips = pipe.scheduler.config.variance_type, pipe.scheduler.config.clip_sample
    beta = pipe.scheduler.betas.double().numpy()
    alpha_bar = np.cumprod(1 - beta)
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    tilde = beta * (1 - before) / (1 - alpha_bar)
    tilde[0] = tilde[1]
    draw, x, terms = torch.Generator().manual_seed(seed), x0.double().numpy(), []
    for t in range(STEPS):
        if t > 0:
            torch.randint(t, t + 1, (), generator=draw)
        noise = torch.randn(x0.shape, generator=draw)
        x_t = float(np.sqrt(alpha_bar[t])) * x0 + float(np.sqrt(1 - alpha_bar[t])) * noise
        with torch.no_grad():
            output = pipe.unet(x_t[None], torch.tensor([t])).sample[0].double().numpy()
        x_t, eps = x_t.double().numpy(), output[:3]
        guess = (x_t - np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha_bar[t])
        guess = np.clip(guess, -1, 1) if clips else guess

        def mean(of, t=t, x_t=x_t):
            first = np.sqrt(before[t]) * beta[t] / (1 - alpha_bar[t])
            return first * of + np.sqrt(1 - beta[t]) * (1 - before[t]) / (1 - alpha_bar[t]) * x_t

        large = beta[t] if t else tilde[0]
        share = (output[3:] + 1) / 2 if kind == "learned_range" else None
        log_variance = {
            "fixed_small": np.log(tilde[t]),
            "fixed_large": np.log(large),
            "learned_range": 0 if share is None else share * np.log(beta[t]) + (1 - share) * np.log(tilde[t]),
        }[kind]
        variance = np.exp(log_variance) * np.ones_like(x)
        if t == 0:
            deviation = np.sqrt(variance)
            upper = np.where(x > 0.999, 1.0, normal_below((x + 1 / 255 - mean(guess)) / deviation))
            lower = np.where(x < -0.999, 0.0, normal_below((x - 1 / 255 - mean(guess)) / deviation))
            nats = -np.log(np.maximum(upper - lower, 1e-12))
        else:
            difference = mean(x) - mean(guess)
            nats = 0.5 * (np.log(variance / tilde[t]) + (tilde[t] + difference**2) / variance - 1)
        terms.append(nats.mean() / np.log(2))
    last = alpha_bar[-1]
    prior = 0.5 * (last * x**2 + (1 - last) - 1 - np.log(1 - last))
    return np.array([*terms, prior.mean() / np.log(2)])


@table("clips", [True, False])
@table("kind", KINDS)
def test_every_term_is_the_papers(kind, clips):
    pipe, x0 = drawing(kind, clip_sample=clips), random_images()
    found = variational_bound(pipe, x0, None, STEPS - 1, seed=3)
    for row in range(len(x0)):
        expected = written_out(pipe, x0[row], 3 + row)
        np.testing.assert_allclose(found.decoder[row], expected[0], rtol=1e-4)
        np.testing.assert_allclose(found.steps[:, row], expected[1:-1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.prior[row], expected[-1], rtol=1e-6)
        assert found.total[row] == pytest.approx(expected.sum(), rel=1e-4)


@pytest.mark.slow
def test_fewer_timesteps_are_unbiased():
    pipe, x0 = drawing(), random_images(1)
    whole = [variational_bound(pipe, x0, None, STEPS - 1, seed).total[0] for seed in range(40)]
    few = [variational_bound(pipe, x0, None, 3, seed).total[0] for seed in range(300)]
    error = np.std(few) / np.sqrt(len(few)) + np.std(whole) / np.sqrt(len(whole))
    assert abs(np.mean(few) - np.mean(whole)) < 3 * error


def test_an_image_does_not_depend_on_those_beside_it():
    pipe, x0 = drawing(), random_images(60)
    together = variational_bound(pipe, x0, None, 2, seed=0).total
    np.testing.assert_allclose(variational_bound(pipe, x0[:7], None, 2, seed=0).total, together[:7], rtol=1e-5)


def test_a_model_of_classes_is_told_them():
    pipe, x0 = drawing(classes=4), random_images(2)
    one, other = (variational_bound(pipe, x0, labels, 3, seed=0).total for labels in ([0, 1], [0, 2]))
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1] != pytest.approx(other[1], rel=1e-5)


def test_the_best_denoiser_of_known_data_pays_its_entropy():
    """Data that are one grey level: the perfect denoiser sends them for nothing but the noise of its first step."""

    class Perfect(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, x_t, timesteps, return_dict):
            alpha, sigma = (v.view(-1, 1, 1, 1) for v in build_schedule(CONFIG).alpha_sigma(timesteps))
            return ((x_t - alpha * level) / sigma,)

    level = 51 / 127.5 - 1
    components = {"unet": Perfect(), "scheduler": build_scheduler(CONFIG, clip_sample=True)}
    found = variational_bound(Pipe(components), torch.full((2, 3, 4, 4), level), None, 5, seed=0)
    assert np.abs(found.steps).max() < 1e-3
    betas = build_schedule(CONFIG).betas
    variance = betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))  # of the posterior at the second step
    within = 2 * normal_below(1 / 255 / math.sqrt(variance)) - 1
    np.testing.assert_allclose(found.decoder, -math.log2(within), rtol=1e-3)


class Pipe:
    def __init__(self, components):
        self.components, self.unet, self.scheduler = components, components["unet"], components["scheduler"]


def test_the_stock_pipeline_is_measured_too_and_others_are_refused():
    pipe = drawing()
    stock = DDPMPipeline(pipe.unet, pipe.scheduler)
    ours = variational_bound(pipe, random_images(), None, 3, seed=0).total
    np.testing.assert_allclose(variational_bound(stock, random_images(), None, 3, seed=0).total, ours)
    other = DDPMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
    assert np.isfinite(variational_bound(other, random_images(), None, 3, seed=0).total).all()
    with pytest.raises(ValueError, match="diffuses latents"):
        variational_bound(latent_pipeline(), random_images(), None, 3, seed=0)
    with pytest.raises(ValueError, match="got 12 timesteps of the bound; expected 1 to 11"):
        variational_bound(pipe, random_images(), None, STEPS, seed=0)


def test_pixel_by_pixel_is_the_entropy_of_each_place():
    training = np.zeros((30, 2, 2, 3), np.uint8)
    training[::2, 0, 0] = 255
    true = training[:2]
    bits = -np.log2([16 / 286, 31 / 286])  # 15 + 1 of 30 + 256; all 30 + 1
    np.testing.assert_allclose(independent_bits(true, training), [(bits[0] + 3 * bits[1]) / 4] * 2)


def test_the_section_names_its_parts():
    x0 = random_images()
    bits = variational_bound(drawing(), x0, None, 3, seed=0)
    images = ((x0 + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    section = bound_section(bits, images, images)
    (row,) = section.rows
    assert row.measure.value == pytest.approx(bits.total.mean())
    assert set(row.beside) == {"pixel by pixel"}
    assert len(section.curves[0].lines["steps"]) == 3
