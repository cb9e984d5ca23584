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

    clips: its convolutions see three successive frames too, as many as before come out (Blattmann et al. 2023, 3.1.1).
    """

    def __init__(self, channels: int = 64, layers: int = 3, clips: bool = False):
        super().__init__()
        convolution = _over_clips if clips else nn.Conv2d
        if channels % NORM_GROUPS or layers < 1:
            raise ConfigError(
                f"reconstruction: got discriminator_channels {channels} and discriminator_layers {layers}; expected a "
                f"multiple of {NORM_GROUPS} and 1 or more"
            )
        parts: list[nn.Module] = [convolution(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [
                convolution(width, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(NORM_GROUPS, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        parts.append(convolution(width, 1, 4, 1, 1))
        self.layers = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, 1, h, w), positive for real, of images (B, 3, H, W) in [-1, 1].

        Those of clips, (B, 3, F, H, W), are (B, 1, F, h, w).
        """
        logits: Tensor = self.layers(pixel_values)
        return logits

    def frozen(self, pixel_values: Tensor) -> Tensor:
        """Return the logits with gradient for the images only: the autoencoder's loss must not train this network."""
        parameters = {name: parameter.detach() for name, parameter in self.named_parameters()}
        logits: Tensor = torch.func.functional_call(self, parameters, (pixel_values,))
        return logits


def _over_clips(channels: int, wider: int, kernel: int, stride: int, padding: int, bias: bool = True) -> nn.Conv3d:
    """Return the convolution of these sizes in height and width, over three frames."""
    return nn.Conv3d(channels, wider, (3, kernel, kernel), (1, stride, stride), (1, padding, padding), bias=bias)
