"""Autoencoders: encoding, decoding, and the scale of their latents."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

CHUNK = 32
"""Images that an autoencoder encodes or decodes at once."""


def downsampling_factor(autoencoder: AutoencoderKL | VQModel) -> int:
    """Return the number of pixels per latent along one side."""
    return int(2 ** (len(autoencoder.config.block_out_channels) - 1))


def posterior_moments(autoencoder: AutoencoderKL | VQModel, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std of the posterior, (B, C, H/f, W/f), in the units that the denoiser sees.

    ``scaling_factor`` is applied; it is 1 for our finished autoencoders (`fold_statistics`). If the encoder returns
    latents and no posterior, the std is 0: VQModel (before quantisation) and AutoencoderTiny.
    """
    encoded, scale = autoencoder.encode(pixel_values), autoencoder.config.scaling_factor
    if hasattr(encoded, "latents"):
        return encoded.latents * scale, torch.zeros_like(encoded.latents)
    return encoded.latent_dist.mean * scale, encoded.latent_dist.std * scale


def decode(autoencoder: AutoencoderKL | VQModel, latents: Tensor) -> Tensor:
    """Return ``pixel_values`` (B, 3, H, W) of `latents` in the units that the denoiser sees; not clipped.

    A VQModel decodes them without quantising them first, as in Kandinsky's pipelines.
    """
    options = {"force_not_quantize": True} if isinstance(autoencoder, VQModel) else {}
    latents = latents / autoencoder.config.scaling_factor
    decoded: Tensor = autoencoder.decode(latents, **options, return_dict=False)[0]
    return decoded


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, pixel_values: Tensor) -> Tensor:
    """Return the images encoded to the posterior's mean and decoded, (B, 3, H, W) in [-1, 1], on the CPU."""
    device = next(autoencoder.parameters()).device
    parts = [
        decode(autoencoder, posterior_moments(autoencoder, part.to(device))[0]).cpu()
        for part in torch.split(pixel_values, CHUNK)
    ]
    return torch.cat(parts).float().clamp(-1, 1)


def fold_config(autoencoder: AutoencoderKL | VQModel) -> None:
    """Fold the latents' shift or mean and std in the config into the weights, in place; do nothing if it has none.

    The denoiser's input is ``(z - shift_factor) * scaling_factor`` for the autoencoders of Stable Diffusion 3 and
    Flux, and ``(z - latents_mean) * scaling_factor / latents_std`` in the pipeline of Stable Diffusion XL. The
    pipelines of Stable Diffusion know only ``scaling_factor``: after folding, that is enough.

    Raises:
        ValueError: the config has both forms, or one of the two statistics; no pipeline of diffusers reads that.

    """
    config = autoencoder.config
    shift, mean, std = (config.get(key) for key in ("shift_factor", "latents_mean", "latents_std"))
    if not shift and mean is None and std is None:
        return
    if (mean is None) != (std is None) or (shift and mean is not None):
        raise ValueError(
            f"the autoencoder's config has shift_factor {shift}, latents_mean {mean} and latents_std {std}; expected "
            "shift_factor alone, or latents_mean and latents_std together"
        )
    channels = config.latent_channels
    mean = torch.as_tensor(shift if mean is None else mean).float().expand(channels)
    std = torch.as_tensor(1.0 if std is None else std).float().expand(channels)
    fold_statistics(autoencoder, mean, std / config.scaling_factor)


@torch.no_grad()
def fold_statistics(autoencoder: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Bring latents to zero mean and unit std per channel, in place, without changing any reconstruction.

    `mean` and `std`, (C,), are those of latents sampled from the posteriors of the training images. ``quant_conv``
    then returns ``(mean - m) / s`` and ``logvar - 2 log s``, and ``post_quant_conv`` undoes it. So ``scaling_factor``
    is 1, there is no shift, and no pipeline can get the scale wrong. An autoencoder without these two layers gets
    them: the 3 x 3 convolutions beside them pad with zeros, so that a mean cannot be folded into those exactly.
    """
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"latents of channel {int(std.argmin())} have std {float(std.min())}; expected > 0")
    channels = len(mean)
    mean, std = mean.double(), std.double()
    encode, back = _pointwise(autoencoder, "quant_conv"), _pointwise(autoencoder, "post_quant_conv")
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
    autoencoder.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)


def _pointwise(autoencoder: AutoencoderKL, name: str) -> nn.Conv2d:
    """Return the 1 x 1 convolution `name`; if there is none, add the identity, in place."""
    if getattr(autoencoder, name) is None:
        like = autoencoder.decoder.conv_in.weight
        channels = 2 * like.shape[1] if name == "quant_conv" else like.shape[1]
        made = nn.Conv2d(channels, channels, 1, device="meta", dtype=like.dtype).to_empty(
            device=like.device
        )  # no random initialisation, which would advance the global generator
        made.load_state_dict({"weight": torch.eye(channels)[:, :, None, None], "bias": torch.zeros(channels)})
        setattr(autoencoder, name, made)
        autoencoder.register_to_config(**{f"use_{name}": True})
    found: nn.Conv2d = getattr(autoencoder, name)
    return found
