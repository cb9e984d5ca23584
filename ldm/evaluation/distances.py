"""Distances between generated and true images as two sets of features: KID and the Frechet distance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.evaluation.measure import DRAWS, Measure

Features = NDArray[np.floating[Any]]
"""Features of N images by a network that was not trained with the model, (N, D)."""

FRECHET_DRAWS = 200
"""Bootstrap resamples of a Frechet distance. Each one needs the singular values of an N x N matrix of N images."""


def kid(features: Features, reference: Features, draws: int = DRAWS, seed: int = 0) -> Measure:
    """Return the kernel inception distance of `features`, (N, D), from `reference`, (M, D), two rows each at least.

    Squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3``, the unbiased estimator over all images
    (Binkowski et al. 2018, eq. 4). If both sets come from one distribution, its expectation is 0, and it is negative
    about half the time. Images are not divided into subsets, whose number would decide the width of the interval. The
    interval comes from resamples of both sets; an image that a resample holds twice makes no pair with itself, which
    would pull every resample up.
    """
    features, reference = _checked(features, reference)
    count, other = len(features), len(reference)
    rng = np.random.default_rng(seed)
    times = np.vstack([np.ones(count), rng.multinomial(count, np.full(count, 1 / count), draws)])  # (1 + draws, N)
    other_times = np.vstack([np.ones(other), rng.multinomial(other, np.full(other, 1 / other), draws)])
    between = ((times @ _kernel(features, reference)) * other_times).sum(1) / (count * other)
    found = _mean_of_pairs(features, times) + _mean_of_pairs(reference, other_times) - 2 * between
    low, high = np.nanquantile(found[1:], [0.025, 0.975])
    return Measure(float(found[0]), float(low), float(high), count)


def frechet_distance(features: Features, reference: Features, draws: int = FRECHET_DRAWS, seed: int = 0) -> Measure:
    """Return the squared Frechet distance of two Gaussians with the moments of `features` and `reference`, (N, D).

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (Heusel et al. 2017). It falls with N, so compare only values of the
    same N: for 200 images it is large even if both sets come from one distribution. The trace of the matrix root is
    computed without that root: for centred A and B with ``S1 = A^T A`` and ``S2 = B^T B`` it is the sum of the
    singular values of ``A B^T``, exact also where N < D. The interval comes from resamples of both sets, and is moved
    onto the value: a resample holds fewer different images, whose distance is larger. Where N < D the interval is
    rather too wide than too narrow.

    Raises:
        ValueError: the two sets differ in size, or have fewer than two images.

    """
    features, reference = _checked(features, reference)
    count = len(features)
    if count != len(reference):
        raise ValueError(
            f"{count} images against {len(reference)}: a Frechet distance depends on how many there are; take as many"
        )
    if 2 * count < features.shape[1]:  # turned into the space that all rows span: fewer columns, the same distances
        features, reference = np.split(np.asarray(np.linalg.qr(np.vstack([features, reference]).T, mode="r")).T, 2)
    rng = np.random.default_rng(seed)
    value = _frechet(features, reference)
    found = [
        _frechet(features[rng.integers(count, size=count)], reference[rng.integers(count, size=count)])
        for _ in range(draws)
    ]
    low, high = np.quantile(found, [0.025, 0.975]) - np.mean(found) + value
    return Measure(value, float(low), float(high), count)


def _kernel(features: Features, others: Features) -> NDArray[np.floating[Any]]:
    kernel: NDArray[np.floating[Any]] = (features @ others.T / features.shape[1] + 1) ** 3
    return kernel


def _mean_of_pairs(features: Features, times: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return the mean kernel over pairs of different rows, (draws,); nan where a draw has no pair.

    `times`, (draws, N), says how often each draw holds each row.
    """
    kernel = _kernel(features, features)
    np.fill_diagonal(kernel, 0)
    pairs = times.sum(1) ** 2 - (times**2).sum(1)
    with np.errstate(invalid="ignore"):  # of two images a resample may hold one twice
        means: NDArray[np.floating[Any]] = ((times @ kernel) * times).sum(1) / pairs
    return means


def _frechet(features: Features, reference: Features) -> float:
    one, two = _deviations(features), _deviations(reference)
    shift = features.mean(0) - reference.mean(0)
    spread = (one**2).sum() + (two**2).sum()  # the traces of both covariances
    return float((shift**2).sum() + spread - 2 * np.linalg.svd(one @ two.T, compute_uv=False).sum())


def _deviations(features: Features) -> Features:
    """Return A, (min(N, D), D), with ``A^T A`` the covariance of the rows of `features`."""
    centred: Features = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    if centred.shape[0] > centred.shape[1]:
        centred = np.asarray(np.linalg.qr(centred, mode="r"))
    return centred


def _checked(features: Features, reference: Features) -> tuple[Features, Features]:
    """Return both in float64; ValueError unless each is (N, D) with N >= 2, D the same for both, and finite."""
    pair = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    if any(rows.ndim != 2 or len(rows) < 2 for rows in pair) or pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(f"got features {pair[0].shape}, reference {pair[1].shape}; expected (N, D), (M, D), N, M >= 2")
    if not all(np.isfinite(rows).all() for rows in pair):
        raise ValueError("features or reference hold a number that is not finite; check the network that made them")
    return pair
