"""Autoencoders: built or loaded, and brought to unit scale when finished."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn


def downsampling_factor(autoencoder: AutoencoderKL | VQModel) -> int:
    """Return the pixels per latent along one side."""
    return int(2 ** (len(autoencoder.config.block_out_channels) - 1))


def posterior_moments(autoencoder: AutoencoderKL | VQModel, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std of the posterior, (B, C, H/f, W/f), in the units that the denoiser sees.

    An unfinished or foreign autoencoder's ``scaling_factor`` is applied; ours is 1 (see `fold_statistics`). A
    VQModel's latents are those before quantisation, with std 0.
    """
    encoded, scale = autoencoder.encode(pixel_values), autoencoder.config.scaling_factor
    if isinstance(autoencoder, VQModel):
        return encoded.latents * scale, torch.zeros_like(encoded.latents)
    return encoded.latent_dist.mean * scale, encoded.latent_dist.std * scale


def decode(autoencoder: AutoencoderKL | VQModel, latents: Tensor) -> Tensor:
    """Return ``pixel_values`` (B, 3, H, W) of `latents` in the units that the denoiser sees; not clipped.

    A VQModel decodes them as they are, not quantised, as Kandinsky's pipelines do.
    """
    options = {"force_not_quantize": True} if isinstance(autoencoder, VQModel) else {}
    latents = latents / autoencoder.config.scaling_factor
    decoded: Tensor = autoencoder.decode(latents, **options, return_dict=False)[0]
    return decoded


@torch.no_grad()
def fold_statistics(autoencoder: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Bring latents to zero mean and unit std per channel, in place, without changing any reconstruction.

    `mean` and `std`, (C,), are those of the latents drawn for the training pictures, the posterior's own spread
    included. ``quant_conv`` then returns ``(mean - m) / s`` and ``logvar - 2 log s`` and ``post_quant_conv`` undoes
    it, so ``scaling_factor`` is 1 and no pipeline can get the scale wrong.
    """
    if not isinstance(autoencoder.quant_conv, nn.Conv2d) or not isinstance(autoencoder.post_quant_conv, nn.Conv2d):
        raise ValueError("statistics fold into quant_conv and post_quant_conv; build the autoencoder with both")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"latents of channel {int(std.argmin())} have std {float(std.min())}; expected > 0")
    channels = len(mean)
    mean, std = mean.double(), std.double()
    encode, back = autoencoder.quant_conv, autoencoder.post_quant_conv
    assert encode.bias is not None  # noqa: S101  (AutoencoderKL builds both with bias)
    assert back.bias is not None  # noqa: S101
    weight, bias = encode.weight.double(), encode.bias.double()
    weight[:channels] /= std[:, None, None, None]
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()
    encode.weight.copy_(weight)
    encode.bias.copy_(bias)
    weight = back.weight.double()
    back.bias.copy_(back.bias.double() + weight[:, :, 0, 0] @ mean)
    back.weight.copy_(weight * std[None, :, None, None])
    autoencoder.register_to_config(scaling_factor=1.0)
