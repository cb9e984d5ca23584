"""Measures from nearest neighbours in features: likeness, variety, copies of training images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm.evaluation.distances import Features
from ldm.evaluation.measure import Measure, bootstrap, mean_of

NEIGHBOURS = 5
"""The k of the k-th nearest neighbour: Naeem et al. 2020 use 5, Kynkaanniemi et al. 2019 use 3."""
MANIFOLD_DRAWS = 200
"""Bootstrap resamples of `manifold_measures`."""


def euclidean(features: Features, others: Features) -> NDArray[np.float64]:
    """Return the Euclidean distance of each row of `features` from each of `others`, (N, M) float64."""
    one, two = np.asarray(features, np.float64), np.asarray(others, np.float64)
    squared = (one**2).sum(1)[:, None] + (two**2).sum(1) - 2 * one @ two.T
    root: NDArray[np.float64] = np.sqrt(np.maximum(squared, 0))
    return root


def manifold_measures(
    features: Features, reference: Features, k: int = NEIGHBOURS, draws: int = MANIFOLD_DRAWS
) -> dict[str, Measure]:
    """Return precision, recall, density and coverage of `features` against `reference`, (N, D) and (M, D).

    An image's neighbourhood reaches to its k-th nearest neighbour in its own set. *Precision*: the share of `features`
    within a neighbourhood of `reference`; *recall*: the other way round (Kynkaanniemi et al. 2019). *Density*: how many
    neighbourhoods of `reference` hold each of `features`, over k, 1 on average for equal distributions; *coverage*: the
    share of neighbourhoods of `reference` that hold one of `features` (Naeem et al. 2020). The interval is over the
    rows that are averaged; the neighbourhoods are not resampled.

    Raises:
        ValueError: a set has no more than k images.

    """
    if min(len(features), len(reference)) <= k:
        raise ValueError(f"{len(features)} and {len(reference)} images; neighbours need more than {k} of each")
    across = euclidean(features, reference)
    reach, reference_reach = (_reach(of, k) for of in (features, reference))
    inside = across <= reference_reach  # (N, M): an image in a neighbourhood of the reference
    found = {
        "precision": inside.any(1),
        "recall": (across <= reach[:, None]).any(0),
        "density": inside.sum(1) / k,
        "coverage": inside.any(0),
    }
    return {name: mean_of(values, draws) for name, values in found.items()}


def _reach(features: Features, k: int) -> NDArray[np.float64]:
    """Return the distance of each row from its k-th nearest other row, (N,)."""
    within = euclidean(features, features)
    np.fill_diagonal(within, 0)  # rounding would make an image its own neighbour at a distance
    reach: NDArray[np.float64] = np.partition(within, k, axis=1)[:, k]
    return reach


def share_nearer(distances: NDArray[np.float64], held_out_distances: NDArray[np.float64]) -> Measure:
    """Return the share of images that are nearer to the training images than the true image of the same caption.

    Both arguments are distances from the nearest training image, (N,). Ties count half: a model without copies has a
    share of about one half.
    """
    nearer = (distances < held_out_distances) + 0.5 * (distances == held_out_distances)
    return mean_of(nearer)


def spread(features: Features, prompt: NDArray[np.int64]) -> Measure:
    """Return the mean distance of images of one prompt over that of images of different prompts.

    `prompt` is the number of each image's prompt, (N,). 0: every seed gives the same image; 1: the prompt decides
    nothing. The interval is over prompts: a resample takes a prompt with all of its images.

    Raises:
        ValueError: fewer than two prompts, or a prompt of one image.

    """
    prompts, counts = np.unique(prompt, return_counts=True)
    if len(prompts) < 2 or counts.min() < 2:
        raise ValueError(f"{len(prompts)} prompts of {min(counts, default=0)} images or more; expected two of each")
    distances = euclidean(features, features)
    member = (prompt == prompts[:, None]).astype(np.float64)  # (P, N)
    sums = member @ distances @ member.T  # (P, P): of all pairs of two prompts
    within = np.diag(sums) / (counts * (counts - 1))
    across = sums / np.outer(counts, counts)
    np.fill_diagonal(across, np.nan)

    def ratio(rows: NDArray[np.int64]) -> float:
        if len(np.unique(rows)) < 2:  # a resample of one prompt alone has no other to be compared with
            rows = np.arange(len(prompts))
        return float(within[rows].mean() / np.nanmean(across[np.ix_(rows, rows)]))

    return bootstrap(ratio, len(prompts))
