"""PatchGAN: a discriminator that classifies each patch as real or reconstructed (Isola et al. 2017, appendix 6.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError

NORM_GROUPS = 4


class PatchDiscriminator(nn.Module):
    """A stack of convolutions, `layers` of them with stride 2, and a logit for each patch.

    It uses group normalisation instead of batch normalisation, so that an image's logits do not depend on the other
    images of its batch. Resumed runs and runs with another number of processes then give the same result.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        if channels % NORM_GROUPS or layers < 1:
            raise ConfigError(
                f"reconstruction: got discriminator_channels {channels} and discriminator_layers {layers}; expected a "
                f"multiple of {NORM_GROUPS} and 1 or more"
            )
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(NORM_GROUPS, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        parts.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.layers = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, 1, h, w), positive for real, of images (B, 3, H, W) in [-1, 1]."""
        logits: Tensor = self.layers(pixel_values)
        return logits

    def frozen(self, pixel_values: Tensor) -> Tensor:
        """Return the logits with gradient for the images only: the autoencoder's loss must not train this network."""
        parameters = {name: parameter.detach() for name, parameter in self.named_parameters()}
        logits: Tensor = torch.func.functional_call(self, parameters, (pixel_values,))
        return logits
