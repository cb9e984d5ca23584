"""The noise path ``x_t = alpha * x0 + sigma * noise`` and the targets that a network can predict on it.

Data is ``x0`` and time runs towards noise. (Papers on flow matching that call the data ``x_1`` run it backwards.)
`alphas_cumprod` in diffusers is our alpha squared; k-diffusion's sigma is our sigma / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ldm.config import ObjectiveConfig, PredictionType
from ldm.errors import ConfigError

BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last beta at 1000 steps: Ho et al. 2020, section 4; Rombach et al. 2022 (Stable Diffusion)."""


def target_coefficients(prediction_type: PredictionType, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(a, b)``, shaped like alpha, such that the network's target is ``a * x0 + b * noise``."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    match prediction_type:
        case "epsilon":  # Ho et al. 2020, eq. 14
            return zero, one
        case "sample":
            return one, zero
        case "v_prediction":  # Salimans & Ho 2022, appendix D
            return -sigma, alpha
        case "flow_prediction":  # d x_t / dt on the flow path: Lipman et al. 2023; Liu et al. 2023
            return -one, one


def recover(
    model_output: Tensor, x_t: Tensor, prediction_type: PredictionType, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``(x0, noise)`` from ``x_t = alpha x0 + sigma noise`` and ``model_output = a x0 + b noise``.

    alpha and sigma broadcast against x_t. Where the target is x_t itself (epsilon at alpha = 0, sample at sigma = 0),
    the system is singular and the result infinite or NaN.
    """
    a, b = target_coefficients(prediction_type, alpha, sigma)
    det = alpha * b - sigma * a
    return (b * x_t - sigma * model_output) / det, (alpha * model_output - a * x_t) / det


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return alpha^2 / sigma^2, the signal-to-noise ratio (Kingma et al. 2021, eq. 2); inf at sigma = 0."""
    return alpha.square() / sigma.square()


class Schedule(Protocol):
    """A noise path over timesteps: the numbers that the network is called with."""

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps of the noise levels u in [0, 1], where 0 is data and 1 is noise."""
        ...

    def alpha_sigma(self, timesteps: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)`` with the shape and on the device of timesteps."""
        ...


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """T variance-preserving steps (alpha^2 + sigma^2 = 1); timesteps are int64 in [0, T - 1].

    One step is q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (Ho et al. 2020, eq. 2); timestep 0
    is the first one, taken from clean data.
    """

    betas: Tensor
    """(T,) float64."""

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The product of 1 - beta up to each step (Ho et al. 2020, eq. 4), (T,) float64."""
        return (1 - self.betas).cumprod(0)

    def timesteps(self, u: Tensor) -> Tensor:
        """Return int64 floor(u T), and T - 1 at u = 1: uniform u makes every step equally likely."""
        return (u * len(self.betas)).long().clamp(max=len(self.betas) - 1)

    def alpha_sigma(self, timesteps: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the roots of alphas_cumprod and of its complement, taken in float64 and then rounded."""
        alpha, sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        # Rounded as they move: some devices have no float64.
        return alpha.to(timesteps.device, dtype)[timesteps], sigma.to(timesteps.device, dtype)[timesteps]


@dataclass(frozen=True)
class FlowSchedule:
    """The straight line alpha = 1 - t, sigma = t (Liu et al. 2023; Lipman et al. 2023, eq. 20).

    Timesteps are ``num_train_timesteps * t``, float32: time embeddings are made for that scale.
    """

    num_train_timesteps: int

    def timesteps(self, u: Tensor) -> Tensor:
        """Return ``num_train_timesteps * u``: on this path t = u."""
        return u * self.num_train_timesteps

    def alpha_sigma(self, timesteps: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return ``(1 - t, t)``; timesteps may be whole numbers, to which diffusers' schedulers round them."""
        t = timesteps.to(dtype) / self.num_train_timesteps
        return 1 - t, t


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Return betas whose last alpha is exactly 0 and first alpha unchanged (Lin et al. 2024, algorithm 1)."""
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alphas_cumprod = alpha.square()
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def build_schedule(config: ObjectiveConfig) -> Schedule:
    """Return the noise path that `config` names; ValueError if the combination is unsound."""
    refuse_unsound(config)
    steps = config.num_train_timesteps
    match config.path:
        case "flow":
            return FlowSchedule(steps)
        case "linear":
            betas = torch.linspace(*BETAS["linear"], steps, dtype=torch.float64) * 1000 / steps
        case "scaled_linear":  # linear in the root of beta
            first, last = BETAS["scaled_linear"]
            betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64).square() * 1000 / steps
        case "cosine":  # Nichol & Dhariwal 2021, eq. 17; capped, since the cosine ends at 0
            t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            alphas_cumprod = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
            betas = (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    return DiscreteSchedule(rescale_zero_terminal_snr(betas) if config.zero_terminal_snr else betas)


def refuse_unsound(config: ObjectiveConfig) -> None:
    """Raise ValueError, with reasons and remedies, if training would be ill-posed or the model could not be sampled."""
    faults = [f"objective.{fault}" for fault in _faults(config)]
    if faults:
        raise ConfigError("\n".join(faults))


def _faults(config: ObjectiveConfig) -> Iterator[str]:
    path, kind, steps = config.path, config.prediction_type, config.num_train_timesteps
    flow = path == "flow"
    if flow and config.zero_terminal_snr:
        yield "zero_terminal_snr: the flow path ends in pure noise already; leave it out"
    if kind == "epsilon" and (flow or config.zero_terminal_snr):
        remedy = "flow_prediction or sample" if flow else "v_prediction or sample"
        yield (
            "prediction_type epsilon: at zero terminal SNR x_t is the noise itself. Predicting it teaches "
            f"nothing, and x0 = (x_t - sigma noise) / alpha divides by 0; use {remedy}"
        )
    if kind == "v_prediction" and flow:
        yield (
            "prediction_type v_prediction: samplers use alpha^2 + sigma^2 = 1 to invert it, which does not "
            "hold on the flow path; use flow_prediction or sample"
        )
    if kind == "flow_prediction" and not flow:
        yield (
            f"prediction_type flow_prediction: no diffusers scheduler samples it on the {path} path; use "
            "path: flow, or v_prediction"
        )
    if flow and steps < 100:
        yield (
            f"num_train_timesteps {steps}: the sampler of the flow path starts at t = 1 - 1 / {steps} and "
            "gives the network whole numbers; use at least 100, better 1000"
        )
    if path in BETAS and steps <= 1000 * BETAS[path][1]:
        yield (
            f"num_train_timesteps {steps}: fewer steps have larger betas, and the last of the {path} path "
            f"would reach 1; use at least {int(1000 * BETAS[path][1]) + 1}, or path: cosine"
        )
    if path == "cosine" and steps < (2 if config.zero_terminal_snr else 1):
        yield f"num_train_timesteps {steps}: use at least 1, and 2 with zero_terminal_snr; 1000 is usual"
