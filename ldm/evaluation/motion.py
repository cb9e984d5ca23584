"""Motion in clips of a subject on a white ground: the path of its middle, and the ratio of its areas."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Clips = NDArray[np.uint8]
"""Clips, (N, F, H, W, 3)."""
Numbers = NDArray[np.floating[Any]]

GROUND = 32
"""Largest distance from white, of 255, of the ground; what lies above it is the subject."""
TOLERANCE_DEGREES = 22.5
"""Half of the angle between two of eight directions: nearer to the one asked for than to any other."""
LEAST_SHARE = 0.5
"""Smallest share of the true motion that counts."""


def subjects(clips: Clips) -> NDArray[np.bool_]:
    """Return where the subject is, (N, F, H, W): pixels that differ from white by more than `GROUND` in a channel."""
    return np.asarray(255 - clips.min(-1) > GROUND)


def middles(clips: Clips) -> Numbers:
    """Return the middle of the subject in each frame, (N, F, 2), as (right, down) in pixels; NaN without a subject."""
    found = subjects(clips)
    rows, columns = np.mgrid[: found.shape[2], : found.shape[3]]
    with np.errstate(invalid="ignore"):
        pairs = [(found * axis).sum((2, 3)) / found.sum((2, 3)) for axis in (columns, rows)]
    return np.stack(pairs, -1)


def displacements(clips: Clips) -> Numbers:
    """Return the way of the subject from the first frame to the last, (N, 2), as (right, down) in pixels.

    It is 0 where the first or the last frame has no subject.
    """
    path = middles(clips)
    return np.nan_to_num(path[:, -1] - path[:, 0])


def moved_as_asked(ways: Numbers, towards: Numbers, true_lengths: Numbers) -> NDArray[np.bool_]:
    """Return whether each way, (N, 2), leads in the direction asked for, and far enough, (N,).

    It lies within `TOLERANCE_DEGREES` of `towards`, (N, 2) of length 1, and is at least `LEAST_SHARE` of the true
    clip's length, (N,). A subject that stays does not.
    """
    lengths = np.linalg.norm(ways, axis=1)
    along = (ways * towards).sum(1)
    near = along >= lengths * np.cos(np.radians(TOLERANCE_DEGREES))
    return np.asarray(near & (lengths > 0) & (lengths >= LEAST_SHARE * true_lengths))


def growths(clips: Clips) -> Numbers:
    """Return the logarithm of the ratio of the subject's areas, last frame to first, (N,); 0 without a subject."""
    areas = subjects(clips).sum((2, 3))
    return np.where((areas[:, 0] > 0) & (areas[:, -1] > 0), np.log(areas[:, -1] + 1e-9) - np.log(areas[:, 0] + 1e-9), 0)


def grown_as_asked(found: Numbers, true: Numbers) -> NDArray[np.bool_]:
    """Return whether each area changes in the true direction, by `LEAST_SHARE` of the true logarithm or more, (N,)."""
    return np.asarray((np.sign(found) == np.sign(true)) & (abs(found) >= LEAST_SHARE * abs(true)) & (true != 0))
