"""Colour profiles of image files: what their numbers mean, and how they become sRGB, by littleCMS."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Mode of an image by the colour space of its profile."""
SAME = 2
"""Levels of 255 by which a profile that is sRGB differs from ours at most: its makers round differently."""


class ProfileError(ValueError):
    """A colour profile cannot be used; the message says why."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the image, of mode L, RGB or CMYK, as RGB in sRGB, by perceptual intent.

    A profile that is sRGB, none, or one that cannot be used, changes nothing: pixels are then taken for sRGB.
    """
    if profile:
        try:
            mode, transform = _transform(profile, image.mode)
        except ProfileError:
            transform = None
        if transform is not None:
            return transform.apply(image if image.mode == mode else image.convert(mode))
    return image.convert("RGB")


def profile_name(profile: bytes | None, mode: str) -> str:
    """Return what a profile of an image of `mode` is called: "none", "sRGB", or its own description."""
    if not profile:
        return "none"
    try:
        if _transform(profile, _plain(mode))[1] is None:
            return "sRGB"
    except ProfileError:
        return "unusable"
    description = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(profile)))
    return " ".join(description.encode(errors="replace").decode().split())[:60] or "without a name"


def profile_fault(profile: bytes | None, mode: str) -> str | None:
    """Return why the profile of an image of `mode` cannot be used; None if it can, or there is none."""
    try:
        if profile:
            _transform(profile, _plain(mode))
    except ProfileError as error:
        return str(error)
    return None


def _plain(mode: str) -> str:
    """Return which of L, RGB and CMYK the colours of an image of `mode` become."""
    return "CMYK" if mode == "CMYK" else "L" if mode[0] in "1LIF" and mode != "LAB" else "RGB"


@lru_cache(maxsize=32)  # the images of a data set share a few profiles, and a transform costs milliseconds
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode that the profile is for and its transform to sRGB, None for the identity; raises ProfileError."""
    try:
        known = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = known.profile.xcolor_space
        wanted = MODES.get(space)
        if wanted is None or (wanted == "CMYK") != (mode == "CMYK") or (wanted == "L" and mode != "L"):
            raise ProfileError(f"a colour profile of {space.strip()}, of an image in {mode}")
        transform = ImageCms.buildTransform(known, ImageCms.createProfile("sRGB"), wanted, "RGB")
        return wanted, None if _is_identity(transform, wanted) else transform
    except ProfileError:
        raise
    except Exception as error:  # OSError, PyCMSError, and what is wrong with a header
        raise ProfileError(f"a colour profile that cannot be used: {error}") from error


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves a grid of colours where they are, but for `SAME` levels."""
    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    image = Image.fromarray(colours if mode == "RGB" else np.arange(256, dtype=np.uint8).reshape(16, 16))
    before, after = (np.asarray(one.convert("RGB"), dtype=int) for one in (image, transform.apply(image)))
    return int(np.abs(before - after).max()) <= SAME
