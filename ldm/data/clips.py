"""Clips of OpenMoji images that move, grow, shrink and turn, made from the images when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from ldm.data.openmoji import OpenMoji
from ldm.data.problems import Problem

SUBJECT = 0.6
"""Width of the subject, as a share of the frame's."""
PATH = 0.4
"""Length of a subject's path from the first frame to the last, as a share of the frame's width."""
SMALL, LARGE = 0.35, 0.85
"""Width of a subject that grows, in the first frame and in the last."""
QUARTER = 90.0
"""Degrees of a turn from the first frame to the last."""
ROOM = 4
"""Width of the canvas that frames are cut from, in widths of the image: the smallest subject leaves 1 / 0.35 of it."""
VERSION = 1
"""Version of the motions, part of the fingerprint; raise it when clips get other pixels than before."""


@dataclass(frozen=True)
class Motion:
    """A motion from the first frame to the last, in the words of a caption."""

    words: str
    towards: tuple[float, float] = (0.0, 0.0)
    """Direction of the path in the image, (right, down), of length 1; (0, 0): it stays."""
    widths: tuple[float, float] = (SUBJECT, SUBJECT)
    """Width of the subject in the first and in the last frame, as a share of the frame's."""
    degrees: float = 0.0
    """Angle that it is turned by, anticlockwise."""


_DIAGONAL = math.sqrt(0.5)
DIRECTIONS = (
    Motion("moving right", (1.0, 0.0)),
    Motion("moving to the lower right", (_DIAGONAL, _DIAGONAL)),
    Motion("moving down", (0.0, 1.0)),
    Motion("moving to the lower left", (-_DIAGONAL, _DIAGONAL)),
    Motion("moving left", (-1.0, 0.0)),
    Motion("moving to the upper left", (-_DIAGONAL, -_DIAGONAL)),
    Motion("moving up", (0.0, -1.0)),
    Motion("moving to the upper right", (_DIAGONAL, -_DIAGONAL)),
)
"""The eight directions, clockwise in the image from the right."""
MOTIONS = (
    *DIRECTIONS,
    Motion("growing", widths=(SMALL, LARGE)),
    Motion("shrinking", widths=(LARGE, SMALL)),
    Motion("turning left", degrees=QUARTER),
    Motion("turning right", degrees=-QUARTER),
)


class OpenMojiClips:
    """Each image of OpenMoji, in some of its groups, with each of `MOTIONS`: clip ``12 * image + motion``."""

    def __init__(self, images: OpenMoji, num_frames: int):
        self._images, self.num_frames = images, num_frames
        self.names = [f"{name}/{motion.words.replace(' ', '-')}" for name in images.names for motion in MOTIONS]
        self.fingerprint = f"{images.fingerprint}-clips-{VERSION}-{num_frames}"
        self.origins = [name for name in images.names for _ in MOTIONS]
        self.subjects = [subject for subject in images.subjects or images.names for _ in MOTIONS]
        self.wholes = None
        self.problems: Sequence[Problem] = ()
        self._canvas = lru_cache(maxsize=8)(self._on_canvas)  # the clips of an image follow one another

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._images) * len(MOTIONS)

    def where(self, index: int) -> str:
        """Return a clip's name."""
        return self.names[index]

    @property
    def lengths(self) -> Sequence[int]:
        """The number of frames of each clip."""
        return [self.num_frames] * len(self)

    def item(self, index: int) -> Sequence[Image.Image]:
        """Return the frames of a clip in the order of time, RGBA, (image_size, image_size)."""
        return self.frames(index, 0, self.num_frames)

    def frames(self, index: int, start: int, count: int) -> Sequence[Image.Image]:
        """Return successive frames of a clip, as `item` does."""
        return [self.frame(index, start + number) for number in range(count)]

    def frame(self, index: int, number: int) -> Image.Image:
        """Return one frame of a clip, as `item` does."""
        image, motion = divmod(index, len(MOTIONS))
        share = number / (self.num_frames - 1)
        return moved(self._canvas(image), MOTIONS[motion], share, self._images.image_size)

    def image(self, index: int) -> Image.Image:
        """Return the middle frame of a clip."""
        return self.frame(index, self.num_frames // 2)

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of a clip: its image's, with the words of its motion."""
        image, motion = divmod(index, len(MOTIONS))
        return [f"{caption} {MOTIONS[motion].words}" for caption in self._images.captions(image)]

    def all_captions(self, index: int) -> Sequence[str]:
        """Return the captions of a clip in every language of OpenMoji; the words of motions are English."""
        image, motion = divmod(index, len(MOTIONS))
        return [f"{caption} {MOTIONS[motion].words}" for caption in self._images.all_captions(image)]

    def class_label(self, index: int) -> int | None:
        """Return the class of a clip's image."""
        return self._images.class_label(index // len(MOTIONS))

    def _on_canvas(self, image: int) -> Image.Image:
        return on_canvas(self._images.image(image))


def on_canvas(image: Image.Image) -> Image.Image:
    """Return an RGBA image in the middle of a transparent canvas, `ROOM` times as wide, that `moved` looks at."""
    width, height = image.size
    canvas = Image.new("RGBA", (ROOM * width, ROOM * height))
    canvas.paste(image, ((ROOM - 1) * width // 2, (ROOM - 1) * height // 2))
    return canvas


def moved(canvas: Image.Image, motion: Motion, share: float, size: int) -> Image.Image:
    """Return a frame of `size` x `size` pixels, RGBA, in which the image on a square `canvas` moves.

    share: of the motion that is done, from 0 in the first frame to 1 in the last. Positions, widths and angles are
    linear in it; half of a path lies on each side of the middle of the frame.
    """
    turned = canvas.rotate(motion.degrees * share, Image.Resampling.BICUBIC) if motion.degrees else canvas
    first, last = motion.widths
    seen = canvas.width / ROOM / (first + share * (last - first))  # pixels of the canvas in a frame's width
    left, top = (canvas.width / 2 - seen / 2 - part * PATH * (share - 0.5) * seen for part in motion.towards)
    return turned.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + seen, top + seen))
