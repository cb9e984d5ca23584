"""PSNR and SSIM of reconstructed images, and the flicker of reconstructed clips."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each image, (B,); both (B, 3, H, W) in [-1, 1], clipped.

    The peak is 2, the width of the range: 10 log10(4 / mean squared error), and 100 dB where the error is 0.
    """
    error = reconstruction.float().clamp(-1, 1) - pixel_values.float()
    squared = error.square().flatten(1).mean(1)
    return (10 * torch.log10(4 / squared)).clamp(max=100)


def flicker(reconstruction: Tensor, clips: Tensor) -> Tensor:
    """Return the flicker of each clip, (B,), of 255 levels; both (B, 3, F, H, W) in [-1, 1], clipped.

    It is the mean absolute error of the change from each frame to the next: 0 also where every frame has one error.
    """
    error = reconstruction.float().clamp(-1, 1) - clips.float()
    return 127.5 * error.diff(dim=2).abs().flatten(1).mean(1)


def ssim(reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
    """Return the structural similarity of each image, (B,), as torchmetrics computes it (Wang et al. 2004)."""
    values = structural_similarity_index_measure(
        reconstruction.float().clamp(-1, 1), pixel_values.float(), data_range=(-1.0, 1.0), reduction="none"
    )
    return values if isinstance(values, Tensor) else values[0]
