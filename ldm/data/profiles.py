"""Colour profiles of image files, and the conversion to sRGB by littleCMS."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""PIL's mode for each colour space of a profile."""
SAME = 2
"""Largest difference, in levels of 255, between sRGB profiles of different makers: they round differently."""


class ProfileError(ValueError):
    """A colour profile cannot be used; the message says why."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the image, of mode L, RGB or CMYK, as RGB in sRGB, by perceptual intent.

    Pixels are taken for sRGB already if there is no profile, if it cannot be used, or if it is sRGB.
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
    """Return the name of the profile of an image of `mode`: "none", "sRGB", "unusable", or its own description."""
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
    """Return the reason why the profile of an image of `mode` cannot be used; None if it can, or there is none."""
    try:
        if profile:
            _transform(profile, _plain(mode))
    except ProfileError as error:
        return str(error)
    return None


def _plain(mode: str) -> str:
    """Return the mode without alpha or palette, L, RGB or CMYK, for the colours of an image of `mode`."""
    return "CMYK" if mode == "CMYK" else "L" if mode[0] in "1LIF" and mode != "LAB" else "RGB"


@lru_cache(maxsize=32)  # the images of a data set share a few profiles, and a transform costs milliseconds
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the profile's mode and its transform to sRGB, None for the identity; ProfileError if it is unusable."""
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
    except Exception as error:  # OSError, PyCMSError, and errors of a damaged header
        raise ProfileError(f"a colour profile that cannot be used: {error}") from error


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return True if a transform changes no colour of a grid by more than `SAME` levels."""
    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    image = Image.fromarray(colours if mode == "RGB" else np.arange(256, dtype=np.uint8).reshape(16, 16))
    before, after = (np.asarray(one.convert("RGB"), dtype=int) for one in (image, transform.apply(image)))
    return int(np.abs(before - after).max()) <= SAME
