"""PSNR and SSIM of reconstructed images."""

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


def ssim(reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
    """Return the structural similarity of each image, (B,), as torchmetrics computes it (Wang et al. 2004)."""
    values = structural_similarity_index_measure(
        reconstruction.float().clamp(-1, 1), pixel_values.float(), data_range=(-1.0, 1.0), reduction="none"
    )
    return values if isinstance(values, Tensor) else values[0]
