"""The denoising loss: noise the clean latents, call the network, weigh its squared error."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from ldm.config import ObjectiveConfig
from ldm.errors import ConfigError
from ldm.objectives.density import Density, build_density
from ldm.objectives.schedule import DiscreteSchedule, Schedule, build_schedule, recover, snr, target_coefficients
from ldm.objectives.variational import interpolated_log_variance, variational_term


class Predict(Protocol):
    """A denoiser with its conditioning filled in."""

    def __call__(self, x_t: Tensor, timesteps: Tensor, /) -> Tensor:
        """Return the output for float32 x_t, (B, C, ...), at timesteps, (B,): C channels, 2C with learned variance."""
        ...


@dataclass(frozen=True)
class Objective:
    """The loss that `config` describes. It knows neither prompts nor networks.

    Schedule, noise and loss are float32, for latents and model outputs of any dtype. The constructor raises ValueError
    for unsound combinations, as does `ldm.objectives.schedule.refuse_unsound`.
    """

    config: ObjectiveConfig
    grid_step: float = 0.0
    """Distance of neighbouring values of x0, for the variational term; 0 if x0 is continuous (`ldm.spaces.Space`)."""

    def __post_init__(self) -> None:
        config, gamma = self.config, self.config.min_snr_gamma
        self.density  # noqa: B018  building it checks its settings
        if gamma is not None and gamma <= 0:
            raise ConfigError(f"objective.min_snr_gamma {gamma}: must be positive; 5 is usual")
        if config.variational_only and (config.variational_weight is None or gamma is not None):
            raise ConfigError(
                "objective.variational_only: the loss is the bound of a learned variance; set variational_weight, "
                "usually 1, and leave min_snr_gamma out"
            )
        if config.variational_weight is not None:
            if config.variational_weight <= 0:
                raise ConfigError(
                    f"objective.variational_weight {config.variational_weight}: must be positive; 1 is usual"
                )
            if not isinstance(self.schedule, DiscreteSchedule) or config.zero_terminal_snr:
                raise ConfigError(
                    "objective.variational_weight: needs steps of noise whose variance can be learned; use path: "
                    "linear, scaled_linear or cosine, without zero_terminal_snr"
                )
        last_alpha, _ = self.schedule.alpha_sigma(self.schedule.timesteps(torch.ones(())))
        if gamma is not None and last_alpha == 0:
            warnings.warn(
                "objective.min_snr_gamma: pure noise, where sampling starts, has weight min(SNR, gamma) = 0 "
                "and is never trained; leave it out where a path ends at zero SNR",
                stacklevel=3,
            )

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule of alpha and sigma: the noise path."""
        return build_schedule(self.config)

    @cached_property
    def density(self) -> Density:
        """The distribution of noise levels in training. It is the only part that can learn, see `Density.observe`."""
        return build_density(self.config)

    def draw(self, x0: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Return noise, shaped like `x0` and on its device, and noise levels from the density, (B,).

        Each sample takes its level, then its noise, from its own generator, on the generator's device. So they do not
        depend on the rest of the batch.
        """
        if len(generators) != len(x0):
            raise ValueError(f"{len(generators)} generators for {len(x0)} samples; expected one for each sample")
        levels = self.density.draw(generators)
        noise = [torch.randn(x0.shape[1:], generator=each, device=each.device) for each in generators]
        return torch.stack(noise).to(x0.device), levels

    def loss_at(self, predict: Predict, x0: Tensor, noise: Tensor, u: Tensor | float) -> Tensor:
        """Return each sample's weighted squared error, averaged over its elements: float32, shape (B,).

        u in [0, 1] is the noise level (0 data, 1 noise), of shape (B,) or one for all.
        """
        if not isinstance(u, Tensor) and not 0 <= u <= 1:
            raise ValueError(f"noise level u = {u}: must be in [0, 1]; it is not a timestep")
        timesteps = self.schedule.timesteps(torch.as_tensor(u).float().expand(len(x0)))
        alpha, sigma = (level.to(x0.device) for level in self.schedule.alpha_sigma(timesteps))
        weight = self.weight(alpha, sigma)

        alpha, sigma = (level.view(-1, *[1] * (x0.ndim - 1)) for level in (alpha, sigma))  # (B, 1, ...)
        a, b = target_coefficients(self.config.prediction_type, alpha, sigma)
        x0, noise = x0.float(), noise.float()
        x_t = alpha * x0 + sigma * noise
        model_output = predict(x_t, timesteps.to(x0.device))
        channels, learned = x0.shape[1], self.config.variational_weight
        expected = (len(x0), channels if learned is None else 2 * channels, *x0.shape[2:])
        if model_output.shape != expected:
            raise ValueError(f"the network returned {tuple(model_output.shape)}, expected {expected}")
        error = model_output[:, :channels] - (a * x0 + b * noise)  # float32 like its second term
        loss: Tensor = weight * error.square().flatten(1).mean(1)
        if learned is None:
            return loss
        mean_half, values = model_output[:, :channels].float(), model_output[:, channels:].float()
        if not self.config.variational_only:  # it trains the variance alone (Nichol & Dhariwal 2021, section 3.1)
            mean_half = mean_half.detach()
        predicted_x0, _ = recover(mean_half, x_t, self.config.prediction_type, alpha, sigma)
        schedule, timesteps = cast(DiscreteSchedule, self.schedule), timesteps.to(x0.device)
        log_variance = interpolated_log_variance(schedule, values, timesteps)
        bits = variational_term(schedule, x0, x_t, timesteps, predicted_x0, log_variance, self.grid_step)
        return learned * bits + (0 if self.config.variational_only else loss)

    def linear_output(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the best model output if x0 is N(0, I) and nothing else is known of it: (B, C or 2C, ...).

        It is the mean of the target given x_t, ``(a alpha + b sigma) / (alpha^2 + sigma^2) x_t``; its squared error is
        ``(a sigma - b alpha)^2 / (alpha^2 + sigma^2)``. A learned variance is halfway between its bounds.
        """
        alpha, sigma = (level.view(-1, *[1] * (x_t.ndim - 1)) for level in self.schedule.alpha_sigma(timesteps.cpu()))
        a, b = target_coefficients(self.config.prediction_type, alpha, sigma)
        slope = (a * alpha + b * sigma) / (alpha.square() + sigma.square())
        output = slope.to(x_t.device) * x_t
        return output if self.config.variational_weight is None else torch.cat([output, torch.zeros_like(output)], 1)

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the weight of the target's squared error, shaped like alpha; finite at SNR 0 and infinity.

        The weight is 1. With min_snr_gamma the squared error of x0 has the weight min(SNR, gamma) (Hang et al. 2023,
        section 3.4), which is expressed here in terms of the target. By `recover` an error of the target is one of x0
        times sigma / |alpha b - sigma a|: 1 / sqrt(SNR) for epsilon, 1 for sample, sigma for v (alpha^2 + sigma^2 = 1)
        and for flow (alpha + sigma = 1).
        """
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return torch.ones_like(alpha)
        ratio = snr(alpha, sigma)
        match self.config.prediction_type:
            case "epsilon":
                return (gamma / ratio).clamp(max=1)  # min(SNR, gamma) / SNR
            case "sample":
                return ratio.clamp(max=gamma)
            case "v_prediction" | "flow_prediction":
                return ratio.clamp(max=gamma) * sigma.square()  # for v: min(SNR, gamma) / (SNR + 1)
