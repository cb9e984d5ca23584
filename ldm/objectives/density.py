"""The distribution of noise levels in training, and the weights of importance sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.config import ObjectiveConfig
from ldm.errors import ConfigError


class Density(Protocol):
    """A distribution over the noise levels, in [0, 1]."""

    levels: Sequence[float] | None
    """The only noise levels that it draws; None: any in [0, 1]."""
    memory: Mapping[str, Tensor]
    """The learned state, on the CPU; changed in place and saved in checkpoints. Empty if the density learns nothing."""

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return a noise level from each generator, (B,), on their device."""

    def weight(self, levels: Tensor) -> Tensor:
        """Return the weights of the losses at `levels` that were drawn, (B,)."""

    def observe(self, levels: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses, (B,), of an optimiser step."""


class UniformDensity:
    """All noise levels equally likely."""

    levels: Sequence[float] | None = None

    def __init__(self) -> None:
        self.memory: Mapping[str, Tensor] = {}

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return a uniform noise level from each generator, (B,)."""
        return torch.stack([torch.rand((), generator=each, device=each.device) for each in generators])

    def weight(self, levels: Tensor) -> Tensor:
        """Return ones, (B,)."""
        return torch.ones_like(levels)

    def observe(self, levels: Tensor, losses: Tensor) -> None:
        """Do nothing: this density does not learn."""


class LogitNormalDensity(UniformDensity):
    """Noise levels whose logit is normal (Esser et al. 2024, eq. 19).

    The density itself is meant to weigh the noise levels, so no weight undoes it.
    """

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the sigmoid of a normal number from each generator, (B,)."""
        normal = torch.stack([torch.randn((), generator=each, device=each.device) for each in generators])
        return (self.mean + self.std * normal).sigmoid()


class LastDensity(UniformDensity):
    """The last noise level alone, pure noise: x0 is predicted from the conditions, as by a regression."""

    levels: Sequence[float] | None = (1.0,)

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return a noise level of 1 for each generator, (B,)."""
        return torch.ones(len(generators), device=generators[0].device)


class LossSecondMomentDensity:
    """Importance sampling: the probability of a timestep is proportional to the root of its mean squared loss.

    There are T timesteps, and the mean is over the last `HISTORY` losses of each. The weights undo the density, so the
    mean loss does not change, and only its variance falls: the terms of the variational bound differ by orders of
    magnitude (Nichol & Dhariwal 2021, section 3.3 and eq. 18). The density is uniform until every timestep was seen
    `HISTORY` times, and by the share `UNIFORM` after that.
    """

    HISTORY = 10
    UNIFORM = 0.001
    levels: Sequence[float] | None = None

    def __init__(self, num_train_timesteps: int) -> None:
        self.memory: Mapping[str, Tensor] = {
            "losses": torch.zeros(num_train_timesteps, self.HISTORY, dtype=torch.float64),
            "seen": torch.zeros(num_train_timesteps, dtype=torch.int64),
        }

    def probabilities(self) -> Tensor:
        """Return the probability of each timestep, (T,) float64."""
        losses, seen = self.memory["losses"], self.memory["seen"]
        even = torch.full((len(seen),), 1 / len(seen), dtype=torch.float64)
        if seen.min() < self.HISTORY:
            return even
        moments = losses.square().mean(1).sqrt()
        return (1 - self.UNIFORM) * moments / moments.sum() + self.UNIFORM * even

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return noise levels, (B,), each the middle of the levels of a timestep that is drawn."""
        u = torch.stack(
            [torch.rand((), generator=each, device=each.device, dtype=torch.float64) for each in generators]
        )
        edges = self.probabilities().cumsum(0)
        timesteps = torch.searchsorted(edges, u.cpu(), right=True).clamp(max=len(edges) - 1)
        return ((timesteps + 0.5) / len(edges)).float().to(u.device)

    def weight(self, levels: Tensor) -> Tensor:
        """Return 1 / (T p) for the timestep of each level, of probability p: (B,) float32."""
        probabilities = self.probabilities()
        return (1 / (len(probabilities) * probabilities[self._timesteps(levels)])).float().to(levels.device)

    def observe(self, levels: Tensor, losses: Tensor) -> None:
        """Keep the losses, in their order; each replaces the oldest one of its timestep."""
        for timestep, loss in zip(self._timesteps(levels).tolist(), losses.tolist(), strict=True):
            self.memory["losses"][timestep, int(self.memory["seen"][timestep]) % self.HISTORY] = loss
            self.memory["seen"][timestep] += 1

    def _timesteps(self, levels: Tensor) -> Tensor:
        return (levels.cpu().double() * len(self.memory["seen"])).long()


def build_density(config: ObjectiveConfig) -> Density:
    """Return the density that `config` names; ValueError for settings that it does not take."""
    if config.logit_std <= 0:
        raise ConfigError(f"objective.logit_std {config.logit_std}: must be positive; 1 is usual")
    if config.timestep_density == "logit_normal":
        return LogitNormalDensity(config.logit_mean, config.logit_std)
    if (config.logit_mean, config.logit_std) != (0, 1):
        raise ConfigError(
            f"objective.logit_mean and logit_std have no effect on a {config.timestep_density} timestep_density; set "
            "timestep_density: logit_normal, or leave them out"
        )
    if config.timestep_density == "uniform":
        return UniformDensity()
    if config.timestep_density == "last":
        # a sampler begins the flow path at another timestep, rounded down
        if config.prediction_type != "sample" or not config.zero_terminal_snr:
            raise ConfigError(
                "objective.timestep_density last: predicts x0 from pure noise; set prediction_type: sample and "
                "zero_terminal_snr: true"
            )
        return LastDensity()
    if config.path == "flow":
        raise ConfigError(
            "objective.timestep_density loss_second_moment: remembers the losses of single timesteps, and the flow "
            "path has none; use uniform or logit_normal"
        )
    return LossSecondMomentDensity(config.num_train_timesteps)
