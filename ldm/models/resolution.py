"""Images at another resolution: smaller, blurred, larger again; what a cascade does to them between its stages."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def shrunk(pixel_values: Tensor, size: int) -> Tensor:
    """Return the images at `size` x `size` pixels, as a file of 8 bits would hold them, in [-1, 1]."""
    small = F.interpolate(pixel_values, size=(size, size), mode="bicubic", antialias=True)
    return ((small.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def shrunk_image(image: Image.Image, size: int) -> Image.Image:
    """Return an image in RGB at `size` x `size` pixels, as `shrunk`."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    small = ((shrunk(pixels, size)[0] + 1) * 127.5).round().permute(1, 2, 0)
    return Image.fromarray(small.numpy().astype(np.uint8))


def blurred(images: Tensor, deviations: Tensor, radius: int) -> Tensor:
    """Return images (B, C, H, W), each blurred by a Gaussian of its standard deviation in pixels, (B,).

    The kernel reaches `radius` pixels; edges are repeated. A deviation of 0 changes nothing.
    """
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernels = torch.softmax(-offsets.square() / (2 * deviations.clamp(min=1e-3).square())[:, None], 1)
    batch, channels = images.shape[:2]
    padded = F.pad(images, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    weights = kernels.repeat_interleave(channels, 0)[:, None]
    once = F.conv2d(padded, weights[:, :, None, :], groups=batch * channels)
    return F.conv2d(once, weights[:, :, :, None], groups=batch * channels)[0].view_as(images)


def enlarged(pixel_values: Tensor, size: int) -> Tensor:
    """Return the images at `size` x `size` pixels, as diffusers' IFSuperResolutionPipeline enlarges them."""
    return F.interpolate(pixel_values, size=(size, size), mode="bilinear", align_corners=True)
