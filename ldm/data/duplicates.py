"""Pictures that look alike: found by a small hash of what they look like, in time that grows with their number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STEP = 2
"""Grey levels from one place to the next that count as brighter; less is noise of compression."""
BITS = 128
MOST_BITS = 10
"""Bits in which pictures that look alike differ at most; those that have nothing in common differ in about 64."""
MOST_COLOUR = 8
"""Levels by which their colours differ at most, in each of 4 x 4 places and each channel."""
BANDS = 8
WINDOW = 64
"""Pictures of one bucket that each is compared with: a bound, for sets in which most pictures are nearly empty."""


@dataclass(frozen=True)
class Look:
    """What a picture looks like, whatever its size."""

    bits: bytes
    """Where it gets brighter to the right (8 x 8 places) and downwards (8 x 8): a difference hash."""
    colours: bytes
    """RGB of 4 x 4 places."""


def look(image: Image.Image) -> Look:
    """Return the look of an RGB picture; compression and other sizes hardly change it, crops and mirrors do."""
    small = image.resize((9, 9), Image.Resampling.BILINEAR, reducing_gap=3)
    grey = np.asarray(small, dtype=np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    right, down = grey[:8, 1:] - grey[:8, :-1], grey[1:, :8] - grey[:-1, :8]
    bits = np.concatenate([right.ravel(), down.ravel()]) > STEP
    colours = image.resize((4, 4), Image.Resampling.BILINEAR, reducing_gap=3)
    return Look(np.packbits(bits).tobytes(), colours.tobytes())


def near_pairs(looks: list[Look]) -> list[tuple[int, int, int]]:
    """Return ``(i, j, bits that differ)`` with i < j of the pictures that look alike, sorted.

    Only pictures that agree in all 16 bits of one of eight bands are compared: of two that differ in up to 7 bits none
    is missed, of those that differ in up to 10 few. In a bucket of more than `WINDOW` pictures only those of similar
    brightness are compared.
    """
    if len(looks) < 2:
        return []
    bits = np.frombuffer(b"".join(look.bits for look in looks), np.uint8).reshape(len(looks), -1)
    colours = np.frombuffer(b"".join(look.colours for look in looks), np.uint8).reshape(len(looks), -1)
    shuffled = np.unpackbits(bits, axis=1)[:, np.random.default_rng(0).permutation(BITS)]  # no band is one place
    bands = np.ascontiguousarray(np.packbits(shuffled, axis=1)).view(np.uint16)
    brightness = colours.sum(1, dtype=np.int64)
    found: set[tuple[int, int, int]] = set()
    for band in range(BANDS):
        order = np.lexsort((brightness, bands[:, band]))
        for shift in range(1, min(WINDOW, len(looks) - 1) + 1):
            left, right = order[:-shift], order[shift:]
            same = bands[left, band] == bands[right, band]
            if not same.any():
                break
            found |= _alike(bits, colours, left[same], right[same])
    return sorted(found)


def _alike(
    bits: NDArray[np.uint8], colours: NDArray[np.uint8], left: NDArray[np.intp], right: NDArray[np.intp]
) -> set[tuple[int, int, int]]:
    distance = np.bitwise_count(bits[left] ^ bits[right]).sum(1, dtype=np.int64)
    colour = np.abs(colours[left].astype(np.int16) - colours[right]).max(1)
    near = (distance <= MOST_BITS) & (colour <= MOST_COLOUR)
    first, second = np.minimum(left, right)[near], np.maximum(left, right)[near]
    return set(zip(first.tolist(), second.tolist(), distance[near].tolist(), strict=True))
