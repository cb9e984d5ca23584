"""From any picture file's mode to RGB, and from RGB to ``pixel_values``."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

MAX_PIXELS = 64_000_000


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return the picture upright, in RGB, over `background` where it is transparent.

    16-bit and float greys are scaled (PIL's own conversion clips them), the EXIF orientation is applied once and
    its tag dropped, palette and key transparency become alpha before they are composited.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"picture of {image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are read")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_to_8bit(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
        canvas.alpha_composite(image)
        return canvas.convert("RGB")
    return image.convert("RGB")


def _grey_to_8bit(image: Image.Image) -> Image.Image:
    """Return an 8-bit grey picture: integers are 16-bit (65535 is white), floats are 0..1, or 0..255 above that.

    With alpha if the picture has a transparent key value, which has 16 bits too.
    """
    values = np.asarray(image, dtype=np.float64)
    float_scale = 255.0 if values.max() <= 1 else 1.0
    scale = float_scale if image.mode == "F" else 1 / 257
    grey = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([grey, alpha]))


def resize_and_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Return the central ``image_size`` square of the picture after its shorter side was resized to it."""
    if image.size == (image_size, image_size):
        return image
    return ImageOps.fit(image, (image_size, image_size), method=Image.Resampling.LANCZOS)


def to_pixel_values(image: Image.Image) -> Tensor:
    """Return (3, H, W) float32 in [-1, 1] of an RGB picture."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(pixel_values: Tensor) -> Tensor:
    """Return (..., H, W, 3) uint8 of (..., 3, H, W) pixel values, rounded and clipped; inverse of `to_pixel_values`."""
    scaled = (pixel_values.float() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)
