"""The held-out retrieval metric: is the image nearest to a generated one its own caption's?

The gallery holds every *distinct* image of the data set, training images included, so a model that
returns a training image is wrong. Distance: root mean squared RGB difference after area-averaging to 16x16,
the smallest over small shifts of the generated image. Ties are misses.

Averages are kept as sums of whole numbers in float64, where a squared distance is exact at every size up to
1024 pixels: ties are ties, and ranks depend neither on the BLAS, nor on threads, nor on the rest of a batch.
(In float32 the distance from an image to itself is not 0: 5 of 1,000 OpenMoji images miss themselves.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.evaluation.measure import Indices, Measure, mean_of
from ldm.models.vision import Images

COARSE_SIZE = 16
"""Pixels, height and width, that images are averaged to before they are compared."""

DRAWS = 10_000
"""Resamples for the interval of a recall: a quantile is then at most one image of 200 off."""

MAX_SHIFT = 3
"""Largest shift of a generated image in either direction, in 64ths of its size (pixels at 64)."""

Distances = NDArray[np.float64]
"""From each of N images to each of M, (N, M)."""


def retrieval_ranks(generated: Images, gallery: Images, own_index: Indices) -> Indices:
    """Return the rank of each generated image's own image in the gallery, (N,) in [0, M - 1]; 0 is right.

    By `pixel_distances`; `own_index` (N,) says which image of the gallery each generated one should be.
    """
    return ranks_among(pixel_distances(generated, gallery), own_index)


def ranks_among(distances: Distances, own_index: Indices) -> Indices:
    """Return how many images of the gallery but their own are as near to each image or nearer, (N,).

    `distances` is (N, M), `own_index` (N,) the place of each image's own. Ties are misses.
    """
    own_index = _check_own_index(own_index, *distances.shape)
    own = np.take_along_axis(distances, own_index[:, None], axis=1)
    return np.asarray((distances <= own).sum(1) - 1, dtype=np.int64)


def pixel_distances(generated: Images, gallery: Images) -> Distances:
    """Return the squared distance of each generated image, (N, S, S, 3), from each of the gallery, (N, M).

    Of sums over the 16 x 16 blocks of an image, which are whole numbers. The generated image is shifted by up to
    3/64 of S (7 x 7 shifts from S = 64 on), white moving in, and the smallest distance taken. Memory is N x M and once
    the gallery at 16 x 16, whatever the number of shifts.
    """
    _check(generated, "generated")
    _check(gallery, "gallery")
    size = generated.shape[1]
    if gallery.shape[1] != size:
        raise ValueError(f"gallery is at {gallery.shape[1]} px, generated at {size} px; expected one size")
    keys = _block_sums(gallery)  # (M, 768)
    minus_twice_keys = -2 * keys.T
    nearest = np.full((len(generated), len(gallery)), np.inf)
    # Truncated: a shift is never more than its share of the image; small images have fewer distinct ones.
    shifts = sorted({int(step * size / 64) for step in range(-MAX_SHIFT, MAX_SHIFT + 1)})
    border = shifts[-1]
    edges = ((0, 0), (border, border), (border, border), (0, 0))
    padded = np.pad(generated, edges, constant_values=255)
    for dy in shifts:
        for dx in shifts:
            top, left = border + dy, border + dx
            query = _block_sums(padded[:, top : top + size, left : left + size])  # (N, 768)
            squared = query @ minus_twice_keys  # (N, M)
            squared += (query**2).sum(1, keepdims=True)
            np.minimum(nearest, squared, out=nearest)
    nearest += (keys**2).sum(1)
    return nearest


def feature_distances(features: NDArray[np.floating[Any]], others: NDArray[np.floating[Any]]) -> Distances:
    """Return one minus the cosine of the angle of each row, (N, D), with each, (M, D): (N, M) in [0, 2]."""
    both = features.astype(np.float64), others.astype(np.float64)
    one, two = (of / np.linalg.norm(of, axis=1, keepdims=True) for of in both)
    distances: Distances = 1 - one @ two.T
    return distances


def recalls(ranks: Indices, ks: Sequence[int] = (1, 5, 10), draws: int = DRAWS, seed: int = 0) -> dict[int, Measure]:
    """Return the share, in [0, 1], of images whose own is among the k nearest, by k."""
    return {k: mean_of(ranks < k, draws, seed) for k in ks}


def _check_own_index(own_index: Indices, count: int, gallery_size: int) -> Indices:
    """Return `own_index` as int64; raise unless it is one position in the gallery for each image."""
    own_index = np.asarray(own_index)
    if own_index.shape != (count,) or not np.issubdtype(own_index.dtype, np.integer):
        got = f"{own_index.dtype} {own_index.shape}"
        raise ValueError(f"own_index is {got}; expected whole numbers ({count},), one for each image")
    if count and (own_index.min() < 0 or own_index.max() >= gallery_size):
        got = f"{own_index.min()}..{own_index.max()}"
        raise ValueError(f"own_index is in {got}; the gallery has positions 0..{gallery_size - 1}")
    return own_index.astype(np.int64)


def _block_sums(images: Images) -> NDArray[np.float64]:
    """Return (N, 768), whole numbers: the sum of each of the 16 x 16 blocks of an image, by channel."""
    count, size = images.shape[:2]
    block = size // COARSE_SIZE
    rows = images.reshape(count, COARSE_SIZE, block, size, 3).sum(2, dtype=np.uint32)
    blocks = rows.reshape(count, COARSE_SIZE, COARSE_SIZE, block, 3).sum(3, dtype=np.uint32)
    sums: NDArray[np.float64] = blocks.reshape(count, -1).astype(np.float64)
    return sums


def _check(images: Images, name: str) -> None:
    shape = images.shape
    square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
    if images.dtype != np.uint8 or not square or shape[1] % COARSE_SIZE or not shape[1]:
        got = f"{images.dtype} {shape}"
        raise ValueError(f"{name} is {got}; expected uint8 (N, S, S, 3) with S a multiple of {COARSE_SIZE}")
