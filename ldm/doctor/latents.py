"""Checks of a latent space: the scale of its latents, and the quality of reconstructions."""

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
"""Lower limits for reconstructions: below them, an image is visibly changed."""
SHOWN = 8
"""Number of images on the sheet of reconstructions."""


def unit_scale(step: DiffusionStep, batch: Batch) -> Finding:
    """Return the finding on whether the latents of a batch have mean 0 and standard deviation 1."""
    scale = latent_scale(step.x0(batch))
    text = f"latents of {len(batch)} training images have mean {scale.mean:.3f} and std {scale.std:.3f}"
    remedy = (
        "; they should have mean 0 and std 1, as the noise has: end the autoencoder's training with train_vae.py, "
        "which folds the statistics in, or multiply the scaling_factor in its config.json by "
        f"{1 / scale.std:.4g}"
    )
    return Finding("latent scale", scale.unit, text if scale.unit else text + remedy)


def round_trip(space: Space, pixel_values: Tensor, folder: Path) -> Finding:
    """Return the finding on reconstructions of images, (N, 3, H, W) in [-1, 1]; write some as round_trip.png.

    Of clips, (N, F, 3, H, W), it is on their frames.
    """
    parts = torch.split(pixel_values, 32)
    rebuilt = torch.cat([space.decode(space.moments(part).mean).cpu() for part in parts]).clamp(-1, 1)
    rebuilt, pixel_values = rebuilt.flatten(0, -4), pixel_values.flatten(0, -4)
    decibel, similar = float(psnr(rebuilt, pixel_values).mean()), float(ssim(rebuilt, pixel_values).mean())
    rows = torch.cat([to_uint8(pixel_values[:SHOWN]), to_uint8(rebuilt[:SHOWN])])
    image_grid(rows.numpy(), min(SHOWN, len(pixel_values))).save(folder / "round_trip.png")
    ok = decibel >= PSNR_DB and similar >= SSIM
    text = f"{len(pixel_values)} validation images come back with PSNR {decibel:.1f} dB and SSIM {similar:.3f}"
    remedy = f"; no denoiser will be better than that: train the autoencoder to {PSNR_DB:g} dB and {SSIM:g} at least"
    return Finding("autoencoder", ok, text + ("" if ok else remedy))
