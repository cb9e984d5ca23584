"""Image files of unknown origin: the one place where they are opened and checked before they are decoded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from ldm.data.pixels import MAX_PIXELS, orientation
from ldm.data.png import without_odd_chunks
from ldm.data.profiles import profile_fault

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read; PIL's others are rare, and most of its security holes are in their readers."""

LEFT_OUT = "left out"
"""Entry of `Image.info` that lists the chunks of a PNG that were hidden from its reader."""


class ImageError(ValueError):
    """An image cannot be read; the message says why. `kind` is a short name of the reason, to count by."""

    def __init__(self, reason: str, kind: str = "unreadable"):
        super().__init__(reason)
        self.kind = kind


def open_image(file: str | BinaryIO) -> Image.Image:
    """Return the image in `file`: size, mode and format are known, the pixels are not decoded yet.

    Raises:
        ImageError: the file is empty, in none of `FORMATS`, or has more than `MAX_PIXELS` pixels by its header.
        OSError: the file itself is missing or cannot be read.

    """
    try:
        with image_errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            sound, left_out = without_odd_chunks(file)
            image: Image.Image = Image.open(sound, formats=FORMATS)
    except ImageError as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        known = f"not an image in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or its header is cut short"
        raise ImageError("the file is empty" if _is_empty(file) else known) from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        image.close()
        raise ImageError(f"{size} pixels; at most {MAX_PIXELS:,} are read", "too large")
    image.info |= {LEFT_OUT: left_out} if left_out else {}
    return image


def metadata_fault(image: Image.Image) -> str | None:
    """Return the part of an image's metadata that cannot be read and is ignored, with the reason; None if all can.

    The image is not decoded yet.
    """
    if left_out := image.info.get(LEFT_OUT):
        return f"chunks that are damaged or too long: {', '.join(left_out)}"
    try:
        orientation(image)
    except Exception as error:  # nearly anything, from struct.error to IndexError
        return f"EXIF or XMP: {type(error).__name__}: {error}"
    return profile_fault(image.info.get("icc_profile"), image.mode)


def decode_pixels(image: Image.Image) -> Image.Image:
    """Return the image with its pixels decoded; ImageError if they are cut short or broken."""
    with image_errors():
        image.load()
    return image


@contextmanager
def image_errors() -> Iterator[None]:
    """Turn errors of the image readers on a broken file into an `ImageError`.

    Disk errors are not changed: the file may be sound.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels; at most {MAX_PIXELS:,} are read", "too large") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ImageError(str(error)) from error
    except Exception as error:  # nearly anything, from struct.error to IndexError
        raise ImageError(f"{type(error).__name__}: {error}") from error


def inside(root: str, path: str) -> str:
    """Return the real path of the file at `path`, relative to the folder `root`, itself a real path.

    Raises:
        ImageError: the path leads out of the folder, also by a symbolic link; or there is no such file.

    """
    real = os.path.realpath(os.path.join(root, path))
    if not real.startswith(os.path.join(root, "")):
        raise ImageError("the path leads out of the folder", "outside")
    if not os.path.isfile(real):  # a pipe is refused too: opening it would wait forever
        raise ImageError("no such file", "missing")
    return real


def _is_empty(file: str | BinaryIO) -> bool:
    return (os.path.getsize(file) if isinstance(file, str) else file.seek(0, os.SEEK_END)) == 0
