"""Algorithms 1 and 2 of Ho et al. 2020 as they are written there, in float64, against what trains and what samples."""

import numpy as np
import pytest
import torch

from ldm.config import ObjectiveConfig, SamplerConfig
from ldm.models.scheduler import build_scheduler
from ldm.objectives.denoising import Objective

from .table import table

T = 1000
BETA = np.linspace(1e-4, 0.02, T)  # section 4
ALPHA = 1 - BETA
ALPHA_BAR = np.cumprod(ALPHA)
LINEAR = ObjectiveConfig(path="linear", prediction_type="epsilon")


def epsilon(x, t):
    """Some network; its time counts from 0, the paper's from 1."""
    return torch.sin(3 * x + t.view(-1, 1, 1, 1) / 100)


def gaussian(seed):
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@table("t", [1, 2, 17, 500, 1000])
def test_training_is_algorithm_1(t):
    """Line 5: || eps - eps_theta(sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, t) ||^2."""
    x0, noise = gaussian(0), gaussian(1)
    x_t = ALPHA_BAR[t - 1] ** 0.5 * x0 + (1 - ALPHA_BAR[t - 1]) ** 0.5 * noise
    expected = (noise - epsilon(x_t, torch.full((4,), t - 1))).square().flatten(1).mean(1)
    objective = Objective(LINEAR)
    (level,) = [u for u in np.linspace(0, 1, 4001) if int(objective.schedule.timesteps(torch.tensor([u]))) == t - 1][:1]
    found = objective.loss_at(epsilon, x0.float(), noise.float(), float(level))
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-6)


def test_every_time_is_trained_alike():
    """Line 3: t is uniform over 1 .. T."""
    times = Objective(LINEAR).schedule.timesteps(torch.linspace(0, 1, 100_001)[:-1])
    counts = torch.bincount(times.long(), minlength=T)
    assert len(counts) == T
    assert int(counts.min()) >= 99
    assert int(counts.max()) <= 101


@table("variance", ["fixed_small", "fixed_large"])
@table("t", [1, 2, 17, 500, 1000])
def test_sampling_is_algorithm_2(t, variance):
    """Line 4, and section 3.2: sigma_t^2 is beta_t, or (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t."""
    scheduler = build_scheduler(LINEAR, SamplerConfig("ddpm", variance))
    scheduler.set_timesteps(T)
    x_t = gaussian(0)
    z = gaussian(5)
    output = epsilon(x_t, torch.full((4,), t - 1))
    before = ALPHA_BAR[t - 2] if t > 1 else 1.0
    small = (1 - before) / (1 - ALPHA_BAR[t - 1]) * BETA[t - 1]
    sigma = (BETA[t - 1] if variance == "fixed_large" else small) ** 0.5 if t > 1 else 0.0
    mean = (x_t - BETA[t - 1] / (1 - ALPHA_BAR[t - 1]) ** 0.5 * output) / ALPHA[t - 1] ** 0.5
    found = scheduler.step(output, t - 1, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    # the scheduler's tables are float32, of which 1 - alpha_bar keeps four digits at the first steps
    torch.testing.assert_close(found, mean + sigma * z, rtol=1e-5, atol=2e-4 if t <= 2 else 2e-5)


def test_what_is_thought_of_an_image_is_clipped():
    """As the authors sample (not in the paper): x0 in [-1, 1], and the posterior's mean of that, eq. 7."""
    scheduler = build_scheduler(LINEAR, SamplerConfig("ddpm"), clip_sample=True)
    scheduler.set_timesteps(T)
    t = 400
    x_t, output = 2 * torch.ones(1, 3, 2, 2, dtype=torch.float64), -torch.ones(1, 3, 2, 2, dtype=torch.float64)
    bar, before = ALPHA_BAR[t - 1], ALPHA_BAR[t - 2]
    x0 = ((x_t - (1 - bar) ** 0.5 * output) / bar**0.5).clamp(-1, 1)
    mean = before**0.5 * BETA[t - 1] / (1 - bar) * x0 + ALPHA[t - 1] ** 0.5 * (1 - before) / (1 - bar) * x_t
    z = torch.randn(1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    sigma = ((1 - before) / (1 - bar) * BETA[t - 1]) ** 0.5
    found = scheduler.step(output, t - 1, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    torch.testing.assert_close(found, mean + sigma * z, rtol=1e-5, atol=1e-5)


def test_ddim_is_the_path_without_noise():
    """Song et al. 2021, eq. 12 with sigma 0."""
    scheduler = build_scheduler(LINEAR, SamplerConfig("ddim"))
    scheduler.set_timesteps(10)
    t, previous = int(scheduler.timesteps[3]) + 1, int(scheduler.timesteps[4]) + 1
    x_t = gaussian(0)
    output = epsilon(x_t, torch.full((4,), t - 1))
    x0 = (x_t - (1 - ALPHA_BAR[t - 1]) ** 0.5 * output) / ALPHA_BAR[t - 1] ** 0.5
    expected = ALPHA_BAR[previous - 1] ** 0.5 * x0 + (1 - ALPHA_BAR[previous - 1]) ** 0.5 * output
    torch.testing.assert_close(scheduler.step(output, t - 1, x_t).prev_sample, expected, rtol=1e-5, atol=1e-5)


@table("kind", ["ddim", "ddpm"])
def test_the_flow_path_has_another_sampler(kind):
    with pytest.raises(ValueError, match="expected dpm_solver"):
        build_scheduler(ObjectiveConfig(path="flow", prediction_type="flow_prediction"), SamplerConfig(kind))
