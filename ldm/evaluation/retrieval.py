"""The held-out retrieval metric: of all images of the data, is the caption's own the nearest to the generated one?

The gallery holds every *distinct* image of the data set, training images included, so a model that
returns a training image is wrong. The distance is the root mean squared RGB difference after area-averaging to 16x16,
the smallest over small shifts of the generated image. Ties are misses.

Averages are kept as sums of whole numbers in float64. A squared distance is then exact at every size up to 1024 pixels,
so that ties are ties, and ranks do not depend on the BLAS, on threads or on the rest of a batch. (In float32 the
distance from an image to itself is not 0: 5 of 1,000 OpenMoji images miss themselves.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.evaluation.measure import Indices, Measure, mean_of
from ldm.models.vision import Images

COARSE_SIZE = 16
"""Height and width, in pixels, that images are averaged to before they are compared."""

RECALL_DRAWS = 10_000
"""Bootstrap resamples of a recall: of 200 images, a quantile is then at most one image off."""

MAX_SHIFT = 3
"""Largest shift of a generated image in either direction, in 64ths of its size (pixels at 64)."""

Distances = NDArray[np.float64]
"""Distances from each of N images to each of M, (N, M)."""


def retrieval_ranks(generated: Images, gallery: Images, own_index: Indices) -> Indices:
    """Return the rank of each generated image's true image in the gallery, (N,) in [0, M - 1]; 0 is right.

    Ranks are by `pixel_distances`; `own_index`, (N,), is the place of the true image in the gallery.
    """
    return ranks_among(pixel_distances(generated, gallery), own_index)


def ranks_among(distances: Distances, own_index: Indices) -> Indices:
    """Return the rank of each image's true image: the number of other gallery images that are as near or nearer, (N,).

    `distances` is (N, M); `own_index`, (N,), is the place of the true image. Ties are misses.
    """
    own_index = _check_own_index(own_index, *distances.shape)
    own = np.take_along_axis(distances, own_index[:, None], axis=1)
    return np.asarray((distances <= own).sum(1) - 1, dtype=np.int64)


def pixel_distances(generated: Images, gallery: Images) -> Distances:
    """Return the squared distance of each generated image, (N, S, S, 3), from each of the gallery, (N, M).

    S is a multiple of 16. Compared are sums of pixels over the 16 x 16 blocks of an image, which are whole numbers. The
    generated image is shifted by up to 3/64 of S (7 x 7 shifts from S = 64 on), with white at the edges, and the
    smallest distance is taken. Memory is N x M numbers and the gallery at 16 x 16, for any number of shifts.
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
    """Return the cosine distance of each row, (N, D), from each of `others`, (M, D): (N, M) in [0, 2]."""
    both = features.astype(np.float64), others.astype(np.float64)
    one, two = (of / np.linalg.norm(of, axis=1, keepdims=True) for of in both)
    distances: Distances = 1 - one @ two.T
    return distances


def recalls(
    ranks: Indices, ks: Sequence[int] = (1, 5, 10), draws: int = RECALL_DRAWS, seed: int = 0
) -> dict[int, Measure]:
    """Return R@k for each k: the share, in [0, 1], of images whose true image is among the k nearest."""
    return {k: mean_of(ranks < k, draws, seed) for k in ks}


def _check_own_index(own_index: Indices, count: int, gallery_size: int) -> Indices:
    """Return `own_index` as int64; ValueError unless it is one position in the gallery for each image."""
    own_index = np.asarray(own_index)
    if own_index.shape != (count,) or not np.issubdtype(own_index.dtype, np.integer):
        got = f"{own_index.dtype} {own_index.shape}"
        raise ValueError(f"own_index is {got}; expected whole numbers ({count},), one for each image")
    if count and (own_index.min() < 0 or own_index.max() >= gallery_size):
        got = f"{own_index.min()}..{own_index.max()}"
        raise ValueError(f"own_index is in {got}; the gallery has positions 0..{gallery_size - 1}")
    return own_index.astype(np.int64)


def _block_sums(images: Images) -> NDArray[np.float64]:
    """Return the sum of each of the 16 x 16 blocks of an image, by channel: whole numbers, (N, 768)."""
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
