"""What is diffused: encodes ``pixel_values`` to tensors of unit scale and decodes them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ldm.config import SpaceConfig
from ldm.models import autoencoder as ae
from ldm.models.network import build_network, weights_hash


@dataclass(frozen=True)
class Moments:
    """Mean and std of a diagonal Gaussian over x0, each (B, C, h, w) float32; std 0 where encoding is exact."""

    mean: Tensor
    std: Tensor

    def sample(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return x0 drawn from the Gaussian, each sample from its own CPU generator."""
        noise = torch.stack([torch.randn(self.mean.shape[1:], generator=generator) for generator in generators])
        return self.mean + self.std * noise.to(self.mean.device)


class Space(Protocol):
    """A space to diffuse in."""

    key: str
    """Names what `moments` computes: equal keys, equal moments of equal pictures."""
    frozen: bool
    """Whether `moments` costs enough to be worth keeping."""
    grid_step: float
    """Distance of two values that x0 can take, 0 if it is continuous."""

    def moments(self, pixel_values: Tensor) -> Moments:
        """Return the distribution of x0 given (B, 3, H, W) in [-1, 1]; no gradient."""

    def decode(self, x0: Tensor) -> Tensor:
        """Return (B, 3, H, W) pixel values, not clipped."""


class PixelSpace:
    """The pictures themselves."""

    key = "pixel"
    frozen = False
    grid_step = 1 / 127.5  # 256 grey levels in [-1, 1]

    def moments(self, pixel_values: Tensor) -> Moments:
        """Return the pictures with std 0."""
        return Moments(pixel_values, torch.zeros_like(pixel_values))

    def decode(self, x0: Tensor) -> Tensor:
        """Return x0."""
        return x0


class LatentSpace:
    """The latents of a frozen autoencoder."""

    frozen = True
    grid_step = 0.0

    def __init__(self, autoencoder: AutoencoderKL):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.key = f"latent-{weights_hash(autoencoder)}"

    @torch.no_grad()
    def moments(self, pixel_values: Tensor) -> Moments:
        """Return the posterior, (B, C, H/f, W/f)."""
        factor, size = ae.downsampling_factor(self.autoencoder), pixel_values.shape[-1]
        if size % factor:
            near = size // factor * factor
            raise ValueError(
                f"data.image_size {size} is not a multiple of the autoencoder's factor {factor}; "
                f"{near} and {near + factor} are"
            )
        parameter = next(self.autoencoder.parameters())
        mean, std = ae.posterior_moments(self.autoencoder, pixel_values.to(parameter.device, parameter.dtype))
        return Moments(mean.float(), std.float())

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Return the pictures of latents."""
        parameter = next(self.autoencoder.parameters())
        return ae.decode(self.autoencoder, x0.to(parameter.device, parameter.dtype)).float()


def build_space(config: SpaceConfig) -> PixelSpace | LatentSpace:
    """Return the space that `config` names."""
    if config.kind == "pixel":
        return PixelSpace()
    if config.autoencoder is None:
        raise ValueError("space.autoencoder: required with space.kind latent; train one with train_vae.py")
    network = build_network({"_class_name": "AutoencoderKL", "pretrained": config.autoencoder}, "space.autoencoder")
    return LatentSpace(network.float())
