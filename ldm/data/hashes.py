"""Names of images by their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from ldm.data.cache import CachedRows
from ldm.data.headers import ImageError, explained
from ldm.data.pixels import READING, to_rgb
from ldm.data.sources import Source

DIGEST_SIZE = 16
"""Bytes."""


def pixel_digest(image: Image.Image) -> bytes:
    """Return the name of an RGB image: equal size and pixels, equal names."""
    size = b"%dx%d" % image.size
    return blake2b(np.asarray(image).tobytes(), digest_size=DIGEST_SIZE, salt=size[:16]).digest()


def pixel_hashes(source: Source, background: str) -> list[str | None]:
    """Return `pixel_digest` of each image in hex, None where it cannot be decoded. Computed once and kept."""

    def compute(rows: range) -> dict[str, Tensor]:
        return {"hash": torch.stack([torch.tensor(list(digest(row)), dtype=torch.uint8) for row in rows])}

    def digest(row: int) -> bytes:
        try:
            image = source.image(row)
            with explained():
                return pixel_digest(to_rgb(image, background))
        except ImageError:
            return bytes(DIGEST_SIZE)

    ImageColor.getrgb(background)  # a wrong colour is an error of its own, not that of every image
    cached = CachedRows("image-hashes", f"{source.fingerprint}/{background}/{READING}", len(source), compute)
    digests = (row.tobytes() for row in cached.column("hash").numpy())
    return [value.hex() if any(value) else None for value in digests]


def lasting_names(hashes: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """Return for each hash the first of the source's own `names` with it; the hashes where the source has none.

    Names are the same on machines that render differently; images of equal pixels still share one.
    """
    if names is None:
        return list(hashes)
    first: dict[str, str] = {}
    for value, name in zip(hashes, names, strict=True):
        first[value] = min(name, first.get(value, name))
    return [first[value] for value in hashes]
