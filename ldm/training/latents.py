"""Whether a space is fit to diffuse in: the scale of its latents, and what comes back from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm.data.pixels import to_uint8
from ldm.evaluation.pictures import image_grid
from ldm.evaluation.quality import psnr, ssim
from ldm.spaces import Space
from ldm.training.findings import Finding

PSNR_DB, SSIM = 20.0, 0.7
"""Below these a round trip through the autoencoder is visibly another picture."""
SHOWN = 8
"""Pictures that are drawn over what comes back."""
MEAN, STD = 0.5, (0.5, 2.0)
"""Most that the mean of the latents may be away from 0, and between what their std may be."""


def latent_scale(space: Space, pixel_values: Tensor) -> Finding:
    """Return whether what is diffused has mean 0 and std 1, over training pictures (N, 3, H, W)."""
    moments = [space.moments(part) for part in torch.split(pixel_values, 32)]
    means = torch.cat([part.mean.cpu() for part in moments]).double()
    variances = torch.cat([part.std.cpu() for part in moments]).double().square()
    mean, std = float(means.mean()), float((means.var() + variances.mean()).sqrt())
    ok = abs(mean) <= MEAN and STD[0] <= std <= STD[1]
    remedy = (
        "; noise of std 1 is no match for that: fold the statistics in (train_vae.py does when it ends), or set "
        f"scaling_factor {1 / std:.4g} in the autoencoder's config.json"
    )
    text = f"latents of {len(pixel_values)} training pictures have mean {mean:.3f} and std {std:.3f}"
    return Finding("latent scale", ok, text + ("" if ok else remedy))


def round_trip(space: Space, pixel_values: Tensor, folder: Path) -> Finding:
    """Return how near pictures (N, 3, H, W) come back from the space, and draw some of them over what came back."""
    parts = torch.split(pixel_values, 32)
    rebuilt = torch.cat([space.decode(space.moments(part).mean).cpu() for part in parts]).clamp(-1, 1)
    decibel, similar = float(psnr(rebuilt, pixel_values).mean()), float(ssim(rebuilt, pixel_values).mean())
    rows = torch.cat([to_uint8(pixel_values[:SHOWN]), to_uint8(rebuilt[:SHOWN])])
    image_grid(rows.numpy(), min(SHOWN, len(pixel_values))).save(folder / "round_trip.png")
    ok = decibel >= PSNR_DB and similar >= SSIM
    text = f"{len(pixel_values)} validation pictures come back with PSNR {decibel:.1f} dB and SSIM {similar:.3f}"
    remedy = f"; no denoiser will be better than that: train the autoencoder to {PSNR_DB:g} dB and {SSIM:g} at least"
    return Finding("autoencoder", ok, text + ("" if ok else remedy))
