"""Whether a space is fit to diffuse in: the scale of its latents, and what comes back from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm.data.batches import Batch
from ldm.data.pixels import to_uint8
from ldm.doctor.findings import Finding
from ldm.evaluation.images import image_grid
from ldm.evaluation.quality import psnr, ssim
from ldm.spaces import Space
from ldm.training.checks import latent_scale
from ldm.training.steps import DiffusionStep

PSNR_DB, SSIM = 20.0, 0.7
"""Below these a round trip through the autoencoder is visibly another image."""
SHOWN = 8
"""Images that are drawn over what comes back."""


def unit_scale(step: DiffusionStep, batch: Batch) -> Finding:
    """Return whether what is diffused of a batch has mean 0 and std 1."""
    scale = latent_scale(step.x0(batch))
    text = f"latents of {len(batch)} training images have mean {scale.mean:.3f} and std {scale.std:.3f}"
    remedy = (
        "; noise of std 1 is no match for that: end the autoencoder's training with train_vae.py, which folds the "
        f"statistics in, or set scaling_factor in its config.json to {1 / scale.std:.4g} times what it is"
    )
    return Finding("latent scale", scale.unit, text if scale.unit else text + remedy)


def round_trip(space: Space, pixel_values: Tensor, folder: Path) -> Finding:
    """Return how near images (N, 3, H, W) come back from the space, and draw some of them over what came back."""
    parts = torch.split(pixel_values, 32)
    rebuilt = torch.cat([space.decode(space.moments(part).mean).cpu() for part in parts]).clamp(-1, 1)
    decibel, similar = float(psnr(rebuilt, pixel_values).mean()), float(ssim(rebuilt, pixel_values).mean())
    rows = torch.cat([to_uint8(pixel_values[:SHOWN]), to_uint8(rebuilt[:SHOWN])])
    image_grid(rows.numpy(), min(SHOWN, len(pixel_values))).save(folder / "round_trip.png")
    ok = decibel >= PSNR_DB and similar >= SSIM
    text = f"{len(pixel_values)} validation images come back with PSNR {decibel:.1f} dB and SSIM {similar:.3f}"
    remedy = f"; no denoiser will be better than that: train the autoencoder to {PSNR_DB:g} dB and {SSIM:g} at least"
    return Finding("autoencoder", ok, text + ("" if ok else remedy))
