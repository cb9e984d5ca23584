"""Near-duplicate images: found by a small hash and confirmed by their pixels, in linear time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STEP = 2
"""Grey levels by which a place must be brighter than its neighbour for a 1 in the hash; less is compression noise."""
BITS = 128
MOST_BITS = 16
"""Largest number of bits in which candidates differ; unrelated images differ in about 64."""
BANDS = 8
WINDOW = 64
"""Most images of one bucket that each image is compared with; it matters where most images are nearly empty."""
PLACES = 32
"""Places on a side at which pixels are compared."""
COARSE = 16
"""Places on a side of the first comparison, and of the only one if an image has fewer than 32 pixels on a side."""
MOST_COLOUR = 12
"""Largest difference of luma and chroma, in levels of 255, in each of 4 x 4 parts of the image."""
GRAIN = 25.0
"""Squared levels by which compression changes a place where the image is even."""
MOST_RESIDUAL = 0.33
"""Largest squared difference in a block, as a share of what varies in it; unrelated images differ in most of that."""
CHUNK = 1024
"""Pairs or images that are computed at once; this bounds the memory."""

Indices = NDArray[np.intp]
Values = NDArray[np.float32]


@dataclass(frozen=True, order=True)
class Look:
    """A summary of an image of any size, in 3 KB, for comparisons."""

    bits: bytes
    """Difference hash: 1 where the image gets brighter to the right (8 x 8 places) or downwards (8 x 8 places)."""
    pixels: bytes
    """YCbCr of 32 x 32 places."""
    detailed: bool
    """True if the image has at least 32 pixels on each side."""


def look(image: Image.Image) -> Look:
    """Return the look of an RGB image. Compression and resizing hardly change it; cropping and mirroring do."""
    small = image.resize((9, 9), Image.Resampling.BILINEAR, reducing_gap=3)
    grey = np.asarray(small, dtype=np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    right, down = grey[:8, 1:] - grey[:8, :-1], grey[1:, :8] - grey[:-1, :8]
    bits = np.concatenate([right.ravel(), down.ravel()]) > STEP
    # HAMMING does not blur an image of this size, and does not shift the contents of a larger one
    pixels = image.resize((PLACES, PLACES), Image.Resampling.HAMMING, reducing_gap=3).convert("YCbCr")
    return Look(np.packbits(bits).tobytes(), pixels.tobytes(), min(image.size) >= PLACES)


def groups(looks: Sequence[Look]) -> list[list[int]]:
    """Return the groups of two or more images that look alike, largest first, each in ascending order.

    Groups are the connected components of the pairs that look alike. A pair is a candidate if it agrees in all 16 bits
    of one of eight bands: no pair that differs in up to 7 bits is missed, and few that differ in up to 10. In a bucket
    of more than `WINDOW` images each image is compared with its nearest ones along one direction of colour; each band
    has another direction. A candidate pair that differs in at most `MOST_BITS` is then compared by pixels. Groups do
    not depend on the order of the images.
    """
    rows = sorted(range(len(looks)), key=looks.__getitem__)
    labels = _labels([looks[row] for row in rows])
    found: dict[int, list[int]] = {}
    for row, label in zip(rows, labels.tolist(), strict=True):
        found.setdefault(label, []).append(row)
    return sorted((sorted(group) for group in found.values() if len(group) > 1), key=lambda group: (-len(group), group))


def _labels(looks: Sequence[Look]) -> Indices:
    """Return for each image the smallest index of its group."""
    labels = np.arange(len(looks))
    if not looks:
        return labels
    bits = np.frombuffer(b"".join(look.bits for look in looks), np.uint8).reshape(len(looks), -1)
    pixels = np.frombuffer(b"".join(look.pixels for look in looks), np.uint8).reshape(-1, PLACES, PLACES, 3)
    pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    detailed = np.array([look.detailed for look in looks])
    parts = [pixels[start : start + CHUNK] for start in range(0, len(looks), CHUNK)]
    coarse = np.concatenate([np.rint(_halved(part)).astype(np.uint8) for part in parts])
    varying = np.concatenate([_varying(coarse[start : start + CHUNK]) for start in range(0, len(looks), CHUNK)])
    for left, right in _candidates(bits, coarse):
        for start in range(0, len(left), CHUNK):
            one, other = left[start : start + CHUNK], right[start : start + CHUNK]
            apart = labels[one] != labels[other]
            one, other = one[apart], other[apart]
            alike = _alike(coarse[one], coarse[other], np.maximum(varying[one], varying[other]))
            one, other = one[alike], other[alike]
            both = detailed[one] & detailed[other]
            first, second = pixels[one[both]], pixels[other[both]]
            alike = ~both
            alike[both] = _alike(first, second, np.maximum(_varying(first), _varying(second)))
            labels = _joined(labels, one[alike], other[alike])
    return labels


def _candidates(bits: NDArray[np.uint8], coarse: NDArray[np.uint8]) -> Iterator[tuple[Indices, Indices]]:
    """Yield pairs with similar bits and colours, each pair once; `bits` is (N, 16), `coarse` (N, 3, 16, 16)."""
    rng, count, side = np.random.default_rng(0), len(bits), COARSE // 4
    shuffled = np.unpackbits(bits, axis=1)[:, rng.permutation(BITS)]  # so that a band is not one region
    bands = np.ascontiguousarray(np.packbits(shuffled, axis=1)).view(np.uint16).T
    first, second = np.ascontiguousarray(bits.view(np.uint64).T)
    colours = coarse.reshape(count, 3, 4, side, 4, side).sum((3, 5), dtype=np.int32).reshape(count, -1)
    directions = colours @ rng.integers(-8, 9, (colours.shape[1], BANDS), dtype=np.int32)
    ranks = np.empty((BANDS, count), np.int32)
    for band, keys in enumerate(bands):
        order = np.lexsort((directions[:, band], keys))
        ranks[band, order] = np.arange(count)
        for shift in range(1, min(WINDOW, count - 1) + 1):
            left, right = order[:-shift], order[shift:]
            same = keys[left] == keys[right]
            if not same.any():
                break
            left, right = left[same], right[same]
            distance = np.bitwise_count(first[left] ^ first[right]) + np.bitwise_count(second[left] ^ second[right])
            left, right = left[distance <= MOST_BITS], right[distance <= MOST_BITS]
            new = np.abs(colours[left] - colours[right]).max(1, initial=0) <= MOST_COLOUR * side**2
            for earlier in range(band):
                compared = np.abs(ranks[earlier, left] - ranks[earlier, right]) <= WINDOW
                new &= ~(compared & (bands[earlier, left] == bands[earlier, right]))
            yield left[new], right[new]


def _halved(values: NDArray[Any]) -> Values:
    """Return the means of 2 x 2 places."""
    rows = values[..., ::2, :].astype(np.float32) + values[..., 1::2, :]
    halved: Values = (rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25)
    return halved


def _blocks(values: Values) -> Values:
    """Return the means, (..., 7, 7), of overlapping blocks: a quarter of the side wide, half a block apart.

    `values` has 32 or 16 places on a side.
    """
    while values.shape[-1] > 8:
        values = _halved(values)
    rows = values[..., 1:, :] + values[..., :-1, :]
    means: Values = (rows[..., 1:] + rows[..., :-1]) * np.float32(0.25)
    return means


def _varying(pixels: NDArray[np.uint8]) -> Values:
    """Return the scale that differences in each block are divided by, (N, 7, 7).

    It is the block's variance plus a fifth of the image's plus `GRAIN`.
    """
    values = pixels.astype(np.float32)
    block = (_blocks(values**2) - _blocks(values) ** 2).sum(1)
    image = values.var((2, 3)).sum(1)
    varying: Values = block + image[:, None, None] / 5 + np.float32(GRAIN)
    return varying


def _alike(one: NDArray[np.uint8], other: NDArray[np.uint8], varying: Values) -> NDArray[np.bool_]:
    """Return for each pair, (N,), True if no block differs by more than `MOST_RESIDUAL` of `varying`."""
    differing = _blocks(((one.astype(np.float32) - other) ** 2).sum(1))
    alike: NDArray[np.bool_] = (differing / varying).max((1, 2)) <= MOST_RESIDUAL
    return alike


def _joined(labels: Indices, left: Indices, right: Indices) -> Indices:
    """Return the labels after the two groups of each pair were joined."""
    labels = labels.copy()
    while (apart := labels[left] != labels[right]).any():
        one, other = labels[left[apart]], labels[right[apart]]
        np.minimum.at(labels, np.maximum(one, other), np.minimum(one, other))
        while ((least := labels[labels]) != labels).any():
            labels = least
    return labels
