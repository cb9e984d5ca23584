"""How far the images of a model are from real ones, as sets: two distances between clouds of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm.evaluation.measure import DRAWS, Measure

Features = NDArray[np.floating]
"""One row for each image, (N, D)."""

FRECHET_DRAWS = 200
"""Resamples for a Frechet distance: each takes the singular values of a matrix, which for 200 images is 200 x 200."""


def kid(features: Features, reference: Features, draws: int = DRAWS, seed: int = 0) -> Measure:
    """Return the kernel inception distance of `features`, (N, D), from `reference`, (M, D), two rows each at least.

    Squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3``, the unbiased estimator over all images
    (Binkowski et al. 2018, eq. 4): 0 in expectation, and as often below it, if both come from one distribution.
    Images are not divided into subsets, whose number would decide the interval. It is that of resamples of both sets
    (an image drawn twice makes no pair with itself: it would pull every resample up).
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

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (Heusel et al. 2017). It falls with N, so compare none of other N:
    of 200 images it is large even where both sets come from one distribution. No root of a matrix is taken: for
    centred A and B with ``S1 = A^T A`` and ``S2 = B^T B`` that trace is the sum of the singular values of ``A B^T``,
    exact also where N < D. The interval is that of resamples of both sets, moved onto the value: in a resample images
    repeat, and the distance of fewer different images is larger. Where N < D it is rather too wide than too narrow.

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


def _kernel(features: Features, others: Features) -> Features:
    kernel: Features = (features @ others.T / features.shape[1] + 1) ** 3
    return kernel


def _mean_of_pairs(features: Features, times: Features) -> Features:
    """Return the mean kernel of the pairs of different rows, each row `times`, (draws, N): (draws,), nan if no pair."""
    kernel = _kernel(features, features)
    np.fill_diagonal(kernel, 0)
    pairs = times.sum(1) ** 2 - (times**2).sum(1)
    with np.errstate(invalid="ignore"):  # two images, and a resample drew one of them twice
        means: Features = ((times @ kernel) * times).sum(1) / pairs
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
    """Return both in float64; raises ValueError unless they are rows of one width, two at least, all finite."""
    pair = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    if any(rows.ndim != 2 or len(rows) < 2 for rows in pair) or pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(f"got features {pair[0].shape}, reference {pair[1].shape}; expected (N, D), (M, D), N, M >= 2")
    if not all(np.isfinite(rows).all() for rows in pair):
        raise ValueError("features or reference hold a number that is not finite; the network that made them failed")
    return pair
