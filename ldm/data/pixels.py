"""Conversion of images in any mode to RGB, and of RGB to ``pixel_values``."""

from __future__ import annotations

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ldm.data.profiles import to_srgb

MAX_PIXELS = 64_000_000
READING = 2
"""Version of the conversion, part of the cache keys; raise it when the same file gives other pixels than before."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition for each value of EXIF's orientation (EXIF 2.32, table 6); 1 is upright."""
ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Entries of `Image.info` that may hold the orientation."""


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return the image upright, in sRGB, with `background` under its transparent parts.

    16-bit and float greys are scaled (PIL's own conversion clips them). The EXIF orientation is applied once and its
    tag dropped. Transparency by palette or key becomes alpha before it is composited. A colour profile is applied.
    Unreadable metadata is ignored.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image of {image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are read")
    image.load()
    image = _upright(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_to_8bit(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba, is_grey = image.convert("RGBA"), image.mode in ("1", "L", "LA", "La")
        colours = to_srgb(rgba.getchannel("R") if is_grey else rgba.convert("RGB"), profile)
        canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
        canvas.alpha_composite(Image.merge("RGBA", (*colours.split(), rgba.getchannel("A"))))
        return canvas.convert("RGB")
    return to_srgb(image.convert("L") if image.mode == "1" else image, profile)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of an image, decoded or not; damaged EXIF raises nearly any error."""
    if isinstance(image, TiffImageFile) or image._exif is not None or any(entry in image.info for entry in ORIENTED):
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # PngImageFile's own getexif would decode
        return found if found in TURNS else 1
    return 1


def _upright(image: Image.Image) -> Image.Image:
    """Return an upright copy of the image, without its entries on orientation."""
    try:
        turn = TURNS.get(orientation(image))
    except Exception:  # the pixels are sound: damaged metadata is ignored
        turn = None
    upright = image.copy() if turn is None else image.transpose(turn)
    upright.info = {key: value for key, value in upright.info.items() if key not in ORIENTED}
    return upright


def _grey_to_8bit(image: Image.Image) -> Image.Image:
    """Return an 8-bit grey image, with alpha if one grey value is marked as transparent.

    White is 65535 for integers; for floats it is 1, or 255 if any is above 1.
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
    """Return the central square of the image, its shorter side resized to ``image_size`` pixels."""
    if image.size == (image_size, image_size):
        return image
    return ImageOps.fit(image, (image_size, image_size), method=Image.Resampling.LANCZOS)


def to_pixel_values(image: Image.Image) -> Tensor:
    """Return (3, H, W) float32 in [-1, 1] of an RGB image."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(pixel_values: Tensor) -> Tensor:
    """Return (..., H, W, 3) uint8 of (..., 3, H, W) pixel values, rounded and clipped; inverse of `to_pixel_values`."""
    scaled = (pixel_values.float() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)
