"""Motion in clips of a subject on a white ground: its way, the ratio of its areas, its turn, and what else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Clips = NDArray[np.uint8]
"""Clips, (N, F, H, W, 3)."""
Numbers = NDArray[np.floating[Any]]

GROUND = 32
"""Largest distance from white, of 255, of the ground; what lies above it is the subject."""
TOLERANCE_DEGREES = 22.5
"""Half of the angle between two of eight directions: nearer to the one asked for than to any other."""
ANGLES = tuple(range(-180, 180, 15))
"""Rotations that are tried, in degrees anticlockwise: three of the 24 count as the one asked for."""
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


def steadied(clips: Clips) -> Clips:
    """Return the clips with the middle of the subject in the middle of each frame, by parts of pixels, on white."""
    height, width = clips.shape[2:4]
    offsets = np.nan_to_num(middles(clips) - ((width - 1) / 2, (height - 1) / 2))
    found = np.empty_like(clips)
    for place in np.ndindex(*clips.shape[:2]):
        right, down = offsets[place]
        moved = (1, 0, right, 0, 1, down)
        frame = Image.fromarray(clips[place]).transform(
            (width, height), Image.Transform.AFFINE, moved, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)
        )
        found[place] = np.asarray(frame)
    return found


def halved(clips: Clips) -> Clips:
    """Return the clips at half their size: each pixel is the mean of four."""
    count, num_frames, height, width, channels = clips.shape
    quarters = clips.reshape(count, num_frames, height // 2, 2, width // 2, 2, channels)
    return np.asarray(quarters.mean((3, 5)).round(), np.uint8)


def changes(clips: Clips) -> Numbers:
    """Return how much the subject changes from frame to frame once its way is taken out, of 255, (N,).

    It is the mean absolute difference of successive `steadied` frames over the pixels where either has the subject, at
    half the size: lines that fall between pixels change from frame to frame in true clips too.
    """
    steady = halved(steadied(clips))
    either = subjects(steady)[:, 1:] | subjects(steady)[:, :-1]
    differences = abs(steady[:, 1:].astype(int) - steady[:, :-1]).mean(-1)
    return np.asarray((differences * either).sum((1, 2, 3)) / np.maximum(either.sum((1, 2, 3)), 1))


def rotation_errors(clips: Clips) -> Numbers:
    """Return the error of the last frame against the first one turned by each of `ANGLES`, (N, 24), of 255."""
    steady = steadied(clips[:, [0, -1]])
    errors = np.zeros((len(clips), len(ANGLES)))
    for number, (first, last) in enumerate(steady):
        for place, angle in enumerate(ANGLES):
            turned = Image.fromarray(first).rotate(angle, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
            errors[number, place] = abs(np.asarray(turned).astype(int) - last).mean()
    return errors


def asymmetric(errors: Numbers, true_angle: Numbers) -> NDArray[np.bool_]:
    """Return for which true clips the best rotation is the true one, and no other one nearly as good, (N,).

    The error at angles farther than `TOLERANCE_DEGREES` from the true one must be half as large again, at least.
    """
    far = ~_near(true_angle[:, None])
    others = np.where(far, errors, np.inf).min(1)
    return np.asarray(others >= 1.5 * np.where(far, np.inf, errors).min(1))


def turned_as_asked(errors: Numbers, true_angle: Numbers) -> NDArray[np.bool_]:
    """Return whether the best rotation lies within `TOLERANCE_DEGREES` of the one asked for, (N,)."""
    return np.asarray(_near(true_angle[:, None])[np.arange(len(errors)), errors.argmin(1)])


def _near(degrees: Numbers) -> NDArray[np.bool_]:
    return np.asarray(abs((np.array(ANGLES) - degrees + 180) % 360 - 180) <= TOLERANCE_DEGREES)
