"""Autoencoders: encoding, decoding, and the scale of their latents."""

from __future__ import annotations

from typing import TypeAlias, cast

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from ldm.models.bottleneck import bottleneck_of
from ldm.models.temporal import VideoAutoencoder

CHUNK = 32
"""Images, or frames of clips, that an autoencoder encodes or decodes at once."""
Autoencoder: TypeAlias = AutoencoderKL | VQModel


def downsampling_factor(autoencoder: Autoencoder) -> int:
    """Return the number of pixels per latent along one side."""
    return int(2 ** (len(autoencoder.config.block_out_channels) - 1))


def posterior_moments(autoencoder: Autoencoder, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std of the latents, (B, C, H/f, W/f), in the units that the denoiser sees.

    ``scaling_factor`` is applied; it is 1 for our finished autoencoders (`fold_statistics`). If the encoder returns
    latents and no posterior, the std is 0: VQModel (before quantisation), and AutoencoderTiny in pipelines of others.
    """
    encoded, scale = autoencoder.encode(pixel_values), autoencoder.config.scaling_factor
    if hasattr(encoded, "latents"):
        return encoded.latents * scale, torch.zeros_like(encoded.latents)
    return encoded.latent_dist.mean * scale, encoded.latent_dist.std * scale


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Return ``pixel_values`` (B, 3, H, W) of `latents` in the units that the denoiser sees; not clipped.

    A VQModel decodes them without quantising them first, as in Kandinsky's pipelines. A `VideoAutoencoder` decodes
    clips, (B, C, F, h, w), too.
    """
    options = {"force_not_quantize": True} if isinstance(autoencoder, VQModel) else {}
    latents = latents / autoencoder.config.scaling_factor
    decoded: Tensor = autoencoder.decode(latents, **options, return_dict=False)[0]
    return decoded


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, pixel_values: Tensor) -> Tensor:
    """Return the images encoded to the latents' mean and decoded, (B, 3, H, W) in [-1, 1], on the CPU.

    Clips, (B, 3, F, H, W), are for a `VideoAutoencoder` alone.
    """
    device = next(autoencoder.parameters()).device
    at_once = CHUNK if pixel_values.ndim == 4 else max(1, CHUNK // pixel_values.shape[2])
    parts = [
        decode(autoencoder, posterior_moments(autoencoder, part.to(device))[0]).cpu()
        for part in torch.split(pixel_values, at_once)
    ]
    return torch.cat(parts).float().clamp(-1, 1)


def last_weight(autoencoder: Autoencoder) -> Tensor:
    """Return the weight of the decoder's last layer that is trained."""
    if isinstance(autoencoder, VideoAutoencoder) and not autoencoder.decoder.conv_out.weight.requires_grad:
        blocks = autoencoder.decoder.up_blocks  # the decoder registers its mid block after them
        last = f"up_blocks-{len(blocks) - 1}-resnets-{len(blocks[-1].resnets) - 1}"
        return cast(Tensor, autoencoder.temporal[last].branch.conv2.weight)
    return cast(Tensor, autoencoder.decoder.conv_out.weight)


def fold_statistics(autoencoder: Autoencoder, mean: Tensor, std: Tensor) -> None:
    """Bring latents to zero mean and unit std, in place, without changing any reconstruction; see `Bottleneck.fold`.

    `mean` and `std`, (C,), are those of the latents of the training images, the spread of posteriors included.
    """
    bottleneck_of(autoencoder).fold(autoencoder, mean.double(), std.double())
