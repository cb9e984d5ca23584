"""Images that look alike: found by a small hash, confirmed by their pixels, in time that grows with their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STEP = 2
"""Grey levels from one place to the next that count as brighter; less is noise of compression."""
BITS = 128
MOST_BITS = 16
"""Bits in which candidates differ at most; images that have nothing in common differ in about 64."""
BANDS = 8
WINDOW = 64
"""Images of one bucket that each is compared with: a bound, for sets in which most images are nearly empty."""
PLACES = 32
"""Places on a side at which pixels are compared."""
COARSE = 16
"""Places at which they are compared first, and last if one of the images has fewer than 32 pixels on a side."""
MOST_COLOUR = 12
"""Levels by which luma and chroma differ at most, in each of 4 x 4 parts of the image."""
GRAIN = 25.0
"""Squared levels of one place that compression changes where the image is even."""
MOST_RESIDUAL = 0.33
"""Share of what varies in a block that may differ; of two that have nothing in common most does."""
CHUNK = 1024
"""Pairs or images that are computed at once, which bounds the memory."""

Indices = NDArray[np.intp]
Values = NDArray[np.float32]


@dataclass(frozen=True, order=True)
class Look:
    """The look of an image, whatever its size, in 3 KB."""

    bits: bytes
    """Where it gets brighter to the right (8 x 8 places) and downwards (8 x 8): a difference hash."""
    pixels: bytes
    """YCbCr of 32 x 32 places."""
    detailed: bool
    """Whether the image has as many pixels on each side."""


def look(image: Image.Image) -> Look:
    """Return the look of an RGB image; compression and other sizes hardly change it, crops and mirrors do."""
    small = image.resize((9, 9), Image.Resampling.BILINEAR, reducing_gap=3)
    grey = np.asarray(small, dtype=np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    right, down = grey[:8, 1:] - grey[:8, :-1], grey[1:, :8] - grey[:-1, :8]
    bits = np.concatenate([right.ravel(), down.ravel()]) > STEP
    # HAMMING neither blurs an image that is as small as this nor shifts what a larger one shows
    pixels = image.resize((PLACES, PLACES), Image.Resampling.HAMMING, reducing_gap=3).convert("YCbCr")
    return Look(np.packbits(bits).tobytes(), pixels.tobytes(), min(image.size) >= PLACES)


def groups(looks: Sequence[Look]) -> list[list[int]]:
    """Return the groups of two or more images that look alike, largest first, each in ascending order.

    A group has everything that is connected by pairs that look alike. A pair is a candidate if it agrees in all 16 bits
    of one of eight bands: of two that differ in up to 7 bits none is missed, of those that differ in up to 10 few. In
    a bucket of more than `WINDOW` images each is compared with those that are nearest along one direction of colour,
    another in each band. A candidate that differs in no more than `MOST_BITS` is confirmed by the pixels. Groups do
    not depend on the order of the images.
    """
    rows = sorted(range(len(looks)), key=looks.__getitem__)
    labels = _labels([looks[row] for row in rows])
    found: dict[int, list[int]] = {}
    for row, label in zip(rows, labels.tolist(), strict=True):
        found.setdefault(label, []).append(row)
    return sorted((sorted(group) for group in found.values() if len(group) > 1), key=lambda group: (-len(group), group))


def _labels(looks: Sequence[Look]) -> Indices:
    """Return the least index of each image's group."""
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
    """Yield pairs whose bits and colours are near, none twice; `bits` is (N, 16), `coarse` (N, 3, 16, 16)."""
    rng, count, side = np.random.default_rng(0), len(bits), COARSE // 4
    shuffled = np.unpackbits(bits, axis=1)[:, rng.permutation(BITS)]  # no band is one place
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
    """Return the means, (..., 7, 7), of blocks of a quarter of the side, half a block apart; of 32 or 16 places."""
    while values.shape[-1] > 8:
        values = _halved(values)
    rows = values[..., 1:, :] + values[..., :-1, :]
    means: Values = (rows[..., 1:] + rows[..., :-1]) * np.float32(0.25)
    return means


def _varying(pixels: NDArray[np.uint8]) -> Values:
    """Return how much varies in each block, (N, 7, 7): its variance, a fifth of the image's, and grain."""
    values = pixels.astype(np.float32)
    block = (_blocks(values**2) - _blocks(values) ** 2).sum(1)
    image = values.var((2, 3)).sum(1)
    varying: Values = block + image[:, None, None] / 5 + np.float32(GRAIN)
    return varying


def _alike(one: NDArray[np.uint8], other: NDArray[np.uint8], varying: Values) -> NDArray[np.bool_]:
    """Return whether no block of each pair differs in much of what varies in it."""
    differing = _blocks(((one.astype(np.float32) - other) ** 2).sum(1))
    alike: NDArray[np.bool_] = (differing / varying).max((1, 2)) <= MOST_RESIDUAL
    return alike


def _joined(labels: Indices, left: Indices, right: Indices) -> Indices:
    """Return the labels after the groups of each pair were joined."""
    labels = labels.copy()
    while (apart := labels[left] != labels[right]).any():
        one, other = labels[left[apart]], labels[right[apart]]
        np.minimum.at(labels, np.maximum(one, other), np.minimum(one, other))
        while ((least := labels[labels]) != labels).any():
            labels = least
    return labels
