"""The variational bound that trains a learned variance (Ho et al. 2020, section 3; Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.objectives.schedule import DiscreteSchedule

GREY_STEP = 1 / 127.5
"""Distance of two neighbouring grey levels of 256 in [-1, 1]."""


def posterior(schedule: DiscreteSchedule, x0: Tensor, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean, (B, ...), and log-variance, (B, 1, ...), of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7).

    At timestep 0 the variance is 0; its logarithm there is that of timestep 1, as in Nichol & Dhariwal's code.
    """
    betas, after = schedule.betas, schedule.alphas_cumprod
    before = torch.cat([after.new_ones(1), after[:-1]])
    of_x0 = before.sqrt() * betas / (1 - after)
    of_x_t = (1 - betas).sqrt() * (1 - before) / (1 - after)
    mean = _at(of_x0, timesteps, x_t) * x0 + _at(of_x_t, timesteps, x_t) * x_t
    return mean, _at(_log_variances(schedule), timesteps, x_t)


def fixed_log_variance(schedule: DiscreteSchedule, variance_type: str, timesteps: Tensor, like: Tensor) -> Tensor:
    """Return the log-variance, (B, 1, ...), of a network that does not learn it.

    fixed_small is that of `posterior`, fixed_large is log beta_t (Ho et al. 2020, section 3.2). At timestep 0 both are
    that of `posterior`, as in Ho et al.'s code: beta_1 says nothing about data on a grid.
    """
    small = _log_variances(schedule)
    match variance_type:
        case "fixed_small":
            return _at(small, timesteps, like)
        case "fixed_large":
            return _at(torch.cat([small[:1], schedule.betas[1:].log()]), timesteps, like)
    raise ValueError(f"variance_type {variance_type!r}: expected fixed_small or fixed_large")


def interpolated_log_variance(schedule: DiscreteSchedule, values: Tensor, timesteps: Tensor) -> Tensor:
    """Return the log-variance, shaped like `values`, between its bounds (Nichol & Dhariwal 2021, eq. 15).

    `values` in [-1, 1] is the second half of the model output. 1 means log beta_t, which is right for data of unit
    variance; -1 means that of `posterior`, which is right for data that is a single point.
    """
    upper, lower = _at(schedule.betas.log(), timesteps, values), _at(_log_variances(schedule), timesteps, values)
    share = (values + 1) / 2
    return share * upper + (1 - share) * lower


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, ...) || N(other_mean, ...)) of each element, in nats."""
    difference = log_variance - other_log_variance
    squared = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (difference.exp() - 1 - difference + squared)


def log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor, grid_step: float) -> Tensor:
    """Return the log-probability of each element, in nats, under N(mean, exp(log_variance)).

    With `grid_step` > 0 it is the probability of the bin of that width around x0; the first and the last bin of [-1, 1]
    are open (Ho et al. 2020, eq. 13). With 0 it is the density, for data that is not on a grid.
    """
    deviation = (0.5 * log_variance).exp()
    centred = x0 - mean
    if grid_step == 0:
        return -0.5 * ((centred / deviation).square() + log_variance + math.log(2 * math.pi))
    above = torch.special.ndtr((centred + grid_step / 2) / deviation).where(x0 < 1 - grid_step / 2, 1.0)
    below = torch.special.ndtr((centred - grid_step / 2) / deviation).where(x0 > -1 + grid_step / 2, 0.0)
    probability: Tensor = (above - below).clamp(min=1e-12)
    return probability.log()


def variational_term(
    schedule: DiscreteSchedule,
    x0: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
    predicted_x0: Tensor,
    predicted_log_variance: Tensor,
    grid_step: float,
) -> Tensor:
    """Return each sample's term L_t of the bound in bits, averaged over its elements, (B,) (Ho et al. 2020, eq. 5).

    L_t is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) from timestep 1 on, and -log p(x0 | x_1) at timestep 0. The mean
    of p follows from `predicted_x0`; its log-variance is (B, 1, ...) or (B, C, ...). `grid_step`: see `log_likelihood`.
    """
    mean, log_variance = posterior(schedule, x0, x_t, timesteps)
    predicted_mean, _ = posterior(schedule, predicted_x0, x_t, timesteps)
    kl = normal_kl(mean, log_variance, predicted_mean, predicted_log_variance)
    decoder = -log_likelihood(x0, predicted_mean, predicted_log_variance, grid_step)
    first = _view(timesteps == 0, x_t)
    return torch.where(first, decoder, kl).flatten(1).mean(1) / math.log(2)


def prior_term(schedule: DiscreteSchedule, x0: Tensor) -> Tensor:
    """Return each sample's L_T = KL(q(x_T | x0) || N(0, I)) of the bound in bits, averaged over its elements, (B,)."""
    kept = schedule.alphas_cumprod[-1].to(x0.dtype)
    nothing = torch.zeros_like(x0)
    nats = normal_kl(kept.sqrt() * x0, nothing + (1 - kept).log(), nothing, nothing)
    return nats.flatten(1).mean(1) / math.log(2)


def _log_variances(schedule: DiscreteSchedule) -> Tensor:
    betas, after = schedule.betas, schedule.alphas_cumprod
    variances = betas[1:] * (1 - after[:-1]) / (1 - after[1:])
    return torch.cat([variances[:1], variances]).log()


def _at(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    # rounded as it moves: some devices have no float64
    return _view(table.to(like.device, like.dtype)[timesteps], like)


def _view(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
