"""Sampling of Nichol & Dhariwal 2021 in float64 from its equations: learned variance, fewer steps than in training."""

import math

import numpy as np
import torch

from ldm.config import ObjectiveConfig, SamplerConfig
from ldm.models.scheduler import build_scheduler

from .table import table

T = 60
COSINE = ObjectiveConfig("cosine", num_train_timesteps=T, variational_weight=1.0)


def alphas_bar():
    """Eq. 17, beta capped at 0.999."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


def normal(seed):
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(x_t, timestep):
    """Return epsilon and v, twice the channels."""
    return torch.cat([torch.sin(2 * x_t + timestep / 9), torch.tanh(x_t - 1)], 1)


@table("clips", [True, False])
@table("steps", [T, 20, 7])
def test_respaced_sampling_takes_the_betas_of_its_own_steps(steps, clips):
    """Section 4: beta_{S_t} = 1 - alpha_bar_{S_t} / alpha_bar_{S_{t-1}}, and both bounds of the variance of those."""
    scheduler = build_scheduler(COSINE, SamplerConfig("ddpm"), clip_sample=clips)
    scheduler.set_timesteps(steps)
    taken = scheduler.timesteps.tolist()
    assert len(taken) == steps
    assert (taken[0], taken[-1]) == (T - 1, 0), "from pure noise to an image without any"
    bars = alphas_bar()[taken]
    for number, timestep in enumerate(taken):
        bar = bars[number]
        before = bars[number + 1] if number + 1 < steps else 1.0
        beta = 1 - bar / before
        tilde = beta * (1 - before) / (1 - bar)
        x_t, z = normal(number), normal(1000 + number)
        epsilon, v = network(x_t, timestep).chunk(2, 1)
        x0 = (x_t - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
        x0 = x0.clamp(-1, 1) if clips else x0
        mean = math.sqrt(before) * beta / (1 - bar) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * x_t
        share = (v + 1) / 2
        log_variance = share * math.log(beta) + (1 - share) * math.log(max(tilde, 1e-20))
        deviation = (0.5 * log_variance).exp() if timestep else 0.0
        draw = torch.Generator().manual_seed(1000 + number)
        found = scheduler.step(network(x_t, timestep), timestep, x_t, generator=draw).prev_sample
        torch.testing.assert_close(found, mean + deviation * z, rtol=2e-4, atol=2e-4)
