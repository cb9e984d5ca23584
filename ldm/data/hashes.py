"""Hashes of images' pixels."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from ldm.data.cache import CachedRows
from ldm.data.content_hashes import joint_hash
from ldm.data.headers import ImageError, image_errors
from ldm.data.items import Source
from ldm.data.pixels import READING, to_rgb

DIGEST_SIZE = 16
"""Bytes of a hash."""


def pixel_digest(image: Image.Image) -> bytes:
    """Return the hash of an RGB image's size and pixels."""
    size = b"%dx%d" % image.size
    return blake2b(np.asarray(image).tobytes(), digest_size=DIGEST_SIZE, salt=size[:16]).digest()


def item_digest(frames: Sequence[Image.Image]) -> bytes:
    """Return `pixel_digest` of an image, or a hash of those of the frames of a clip."""
    digests = [pixel_digest(frame) for frame in frames]
    return digests[0] if len(digests) == 1 else joint_hash(digests)


def pixel_hashes(source: Source, background: str) -> list[str | None]:
    """Return `item_digest` of each item in hex, None for one that cannot be decoded; cached."""

    def compute(rows: range) -> dict[str, Tensor]:
        return {"hash": torch.stack([torch.tensor(list(digest(row)), dtype=torch.uint8) for row in rows])}

    def digest(row: int) -> bytes:
        try:
            frames = source.item(row)
            with image_errors():
                return item_digest([to_rgb(frame, background) for frame in frames])
        except ImageError:
            return bytes(DIGEST_SIZE)

    ImageColor.getrgb(background)  # a wrong colour is one error, not one for each image
    cached = CachedRows("pixel-hashes", f"{source.fingerprint}/{background}/{READING}", len(source), compute)
    digests = (row.tobytes() for row in cached.column("hash").numpy())
    return [value.hex() if any(value) else None for value in digests]


def lasting_names(hashes: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """Return a name for each hash that is equal on all machines, even if they render differently.

    It is the source's own name, and of several images with equal pixels the smallest one; without `names`, the hash.
    """
    if names is None:
        return list(hashes)
    first: dict[str, str] = {}
    for value, name in zip(hashes, names, strict=True):
        first[value] = min(name, first.get(value, name))
    return [first[value] for value in hashes]
