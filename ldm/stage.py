"""The one place where parts are put together: space + denoiser + objective + conditioners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioner, Inputs, build_conditioners, merge
from ldm.config import StageConfig
from ldm.models.network import build_network, zero_tails
from ldm.objective import Objective
from ldm.spaces import LatentSpace, PixelSpace, build_space


class ConditionedDenoiser(nn.Module):
    """The trained module: conditioners and denoiser behind one forward, so that every process sees the same graph."""

    def __init__(self, denoiser: nn.Module, conditioners: Mapping[str, nn.Module]):
        super().__init__()
        self.denoiser = denoiser
        self.conditioners = nn.ModuleDict(conditioners)

    def forward(self, x_t: Tensor, timesteps: Tensor, inputs: Mapping[str, Inputs]) -> Tensor:
        """Return ``model_output``, (B, C or 2C, ...), for noisy `x_t` at the network's `timesteps`."""
        conditions = merge([self.conditioners[name](**inputs[name]) for name in self.conditioners])
        output: Tensor = self.denoiser(
            torch.cat([x_t, *conditions.channels], 1), timestep=timesteps, **conditions.kwargs, return_dict=False
        )[0]
        return output

    def encoders(self) -> list[nn.Module]:
        """Return the networks of the conditioners that are trained with the denoiser."""
        conditioners = map(self.conditioner, self.conditioners)
        return [network for one in conditioners if not one.frozen for network in one.networks]

    def conditioner(self, name: str) -> Conditioner:
        """Return conditioner `name`."""
        return cast(Conditioner, self.conditioners[name])


@dataclass(frozen=True)
class Stage:
    """What is trained, and what it is trained in."""

    space: PixelSpace | LatentSpace
    model: ConditionedDenoiser
    objective: Objective


def build_stage(config: StageConfig, captions: Sequence[str]) -> Stage:
    """Return the stage that `config` describes; `captions` are those of the training split, for the tokenizer.

    Weights are drawn from the global generator, seeded by ``config.seed`` here.
    """
    torch.manual_seed(config.seed)
    space = build_space(config.space)
    conditioners = build_conditioners(config.conditioners, captions)
    denoiser = build_network(config.denoiser, "denoiser")
    if "pretrained" not in config.denoiser:
        zero_tails(denoiser)
    model = ConditionedDenoiser(denoiser, conditioners)
    return Stage(space, model, Objective(config.objective, space.grid_step))
