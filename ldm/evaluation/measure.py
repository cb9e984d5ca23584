"""A measured number with its bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
"""Whole numbers, (N,): positions in a gallery, or ranks."""

DRAWS = 1000
"""Number of bootstrap resamples."""


@dataclass(frozen=True)
class Measure:
    """A number that was measured on `n` images (or captions), with its central 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Return the value and, in brackets, the interval, with three decimals.

        With four digits if one is 10 or more; if all are below 0.01, with decimals for three digits.
        """
        largest = max(abs(self.low), abs(self.high))
        form = f".{2 - math.floor(math.log10(largest))}f" if 0 < largest < 0.01 else ".3f"
        form = ".4g" if largest >= 10 else form
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


def mean_of(values: NDArray[np.floating[Any]] | NDArray[np.bool_], draws: int = DRAWS, seed: int = 0) -> Measure:
    """Return the mean of `values`, (N,), one for each image; ValueError if there are none."""
    numbers = np.asarray(values, np.float64)
    return bootstrap(lambda rows: float(numbers[rows].mean()), len(numbers), draws, seed)


def bootstrap(statistic: Callable[[Indices], float], n: int, draws: int = DRAWS, seed: int = 0) -> Measure:
    """Return `statistic` of the rows 0..n-1, with its central 95 % over `draws` resamples of the rows.

    Percentile bootstrap, with replacement; the same seed gives the same interval. It knows only the images that were
    measured: for a share without a hit the interval is ``(0, 0)``.

    Raises:
        ValueError: `n` is 0.

    """
    if n < 1:
        raise ValueError("nothing was measured: a number needs at least one image")
    rng = np.random.default_rng(seed)
    found = [statistic(rng.integers(n, size=n)) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Measure(statistic(np.arange(n)), float(low), float(high), n)
