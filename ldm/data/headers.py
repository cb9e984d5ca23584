"""What an image file says of itself before it is decoded: the one door for files of unknown origin."""

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
"""Formats that are read; the others of PIL are rare, and their readers are where its holes are found."""

LEFT_OUT = "left out"
"""Entry of `Image.info`: chunks of a PNG that were not given to its reader."""


class ImageError(ValueError):
    """An image cannot be read; the message says why. `kind` is one word or two for why, to count by."""

    def __init__(self, reason: str, kind: str = "unreadable"):
        super().__init__(reason)
        self.kind = kind


def open_image(file: str | BinaryIO) -> Image.Image:
    """Return the image in `file` with its size, mode and format known and its pixels not yet decoded.

    Raises:
        ImageError: it is empty, of none of `FORMATS`, or of more than `MAX_PIXELS` pixels by its header.
        OSError: the file itself is missing or cannot be read.

    """
    try:
        with explained(), warnings.catch_warnings():
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
    """Return what of the metadata of an image, not decoded yet, cannot be read and is ignored; None if all can."""
    if left_out := image.info.get(LEFT_OUT):
        return f"chunks that are damaged or too long: {', '.join(left_out)}"
    try:
        orientation(image)
    except Exception as error:  # nearly anything, from struct.error to IndexError
        return f"EXIF or XMP: {type(error).__name__}: {error}"
    return profile_fault(image.info.get("icc_profile"), image.mode)


def decode(image: Image.Image) -> Image.Image:
    """Return the image with its pixels decoded; raises ImageError if they are cut short or broken."""
    with explained():
        image.load()
    return image


@contextmanager
def explained() -> Iterator[None]:
    """Turn what readers of images raise on a broken file into a `ImageError`.

    Errors of the disk stay what they are: the file may be sound.
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
    """Return the real path of file `path`, relative to the folder `root`, which is a real path itself.

    Raises:
        ImageError: it leads out of the folder, also by a symbolic link, or there is no such file.

    """
    real = os.path.realpath(os.path.join(root, path))
    if not real.startswith(os.path.join(root, "")):
        raise ImageError("the path leads out of the folder", "outside")
    if not os.path.isfile(real):  # also no pipe, which would be waited for
        raise ImageError("no such file", "missing")
    return real


def _is_empty(file: str | BinaryIO) -> bool:
    return (os.path.getsize(file) if isinstance(file, str) else file.seek(0, os.SEEK_END)) == 0
