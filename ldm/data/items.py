"""Items of data: an image, or a clip of several frames with one caption."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from ldm.data.sources import Source


class Stills(ABC):
    """A base class of sources whose items are images."""

    num_frames: int | None = None
    origins: Sequence[str] | None = None
    subjects: Sequence[str] | None = None
    wholes: Sequence[str] | None = None

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return an image in its own mode."""

    def item(self, index: int) -> Sequence[Image.Image]:
        """Return the image alone."""
        return (self.image(index),)

    def frame(self, index: int, number: int) -> Image.Image:
        """Return the image; it has no other frame than number 0."""
        return self.item(index)[number]


class Frames(Stills):
    """Every frame of every clip of a source, as images: frame f of clip i is image ``i * num_frames + f``."""

    def __init__(self, clips: Source):
        """Take a source whose items are clips; ValueError for one of images."""
        if clips.num_frames is None:
            raise ValueError("data.items: got frames of a source of images; expected all, the default")
        self._clips, self._frames = clips, clips.num_frames
        self.fingerprint = f"{clips.fingerprint}-frames"
        self.names = self.wholes = None
        if clips.names is not None:
            self.names = [f"{name}/{frame}" for name in clips.names for frame in range(self._frames)]
            self.wholes = _repeated(clips.names, self._frames)
        self.origins = _repeated(clips.origins or [*map(str, range(len(clips)))], self._frames)
        self.subjects = None if clips.subjects is None else _repeated(clips.subjects, self._frames)

    def __len__(self) -> int:
        """Return the number of frames of all clips."""
        return len(self._clips) * self._frames

    def image(self, index: int) -> Image.Image:
        """Return a frame in its own mode."""
        return self._clips.frame(*divmod(index, self._frames))

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of the frame's clip."""
        return self._clips.captions(index // self._frames)

    def all_captions(self, index: int) -> Sequence[str]:
        """Return every caption of the frame's clip."""
        return self._clips.all_captions(index // self._frames)

    def class_label(self, index: int) -> int | None:
        """Return the class of the frame's clip."""
        return self._clips.class_label(index // self._frames)


def _repeated(names: Sequence[str], times: int) -> list[str]:
    return [name for name in names for _ in range(times)]
