"""Items of data, images or clips with a caption, and sources of them: frames, cuts of videos, some of the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from PIL import Image

from ldm.data.problems import Problem


class Source(Protocol):
    """Captioned items by index: images, or clips of several frames."""

    @property
    def num_frames(self) -> int | None:
        """Return the frames of each item; None: items are images."""

    @property
    def origins(self) -> Sequence[str] | None:
        """Return the name of what each item was made of: items of one share a split by hash. None: each has its own."""

    @property
    def subjects(self) -> Sequence[str] | None:
        """Return the name of what each item shows, for ``data.balance``; None: it is not known."""

    @property
    def problems(self) -> Sequence[Problem]:
        """Return the problems that were found while the rows were read."""

    @property
    def fingerprint(self) -> str:
        """Return a name of the images, not of captions or paths: equal fingerprints, equal images in this order."""

    @property
    def names(self) -> Sequence[str] | None:
        """Return a name of each image that does not depend on the last bits of its pixels; None: there are none."""

    @property
    def wholes(self) -> Sequence[str] | None:
        """Return the name of the item that each is a part of, as a frame of a clip; None: each is whole.

        A model that was trained on a part has seen the whole.
        """

    def __len__(self) -> int:
        """Return the number of items."""

    def item(self, index: int) -> Sequence[Image.Image]:
        """Return the frames of an item in the order of time, in their own mode: one of an image."""

    def frame(self, index: int, number: int) -> Image.Image:
        """Return one frame of an item, by its number from 0 on."""

    def image(self, index: int) -> Image.Image:
        """Return an image in its own mode; of a clip the middle frame, which stands for it in galleries."""

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions that an item is trained with, possibly none."""

    def all_captions(self, index: int) -> Sequence[str]:
        """Return every caption of an image, also in other languages: lists of held-out captions match any of them."""

    def class_label(self, index: int) -> int | None:
        """Return the number of an image's class, `UNKNOWN_CLASS` if it is unknown; None if the data has no classes."""


class Stills(ABC):
    """A base class of sources whose items are images."""

    num_frames: int | None = None
    origins: Sequence[str] | None = None
    subjects: Sequence[str] | None = None
    wholes: Sequence[str] | None = None
    problems: Sequence[Problem] = ()

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
        self._clips, self._frames, self.problems = clips, clips.num_frames, clips.problems
        self.fingerprint = f"{clips.fingerprint}-frames"
        self.names = self.wholes = None
        if clips.names is not None:
            self.names = [f"{name}/{frame}" for name in clips.names for frame in range(self._frames)]
            self.wholes = _repeated(clips.wholes or clips.names, self._frames)
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


class Videos(Protocol):
    """Captioned videos by index, which clips are cut from; each may have a length of its own."""

    @property
    def fingerprint(self) -> str:
        """Return a name of the frames: equal fingerprints, equal frames in this order."""

    @property
    def lengths(self) -> Sequence[int]:
        """Return the number of frames of each video."""

    @property
    def names(self) -> Sequence[str]:
        """Return a name of each video."""

    @property
    def origins(self) -> Sequence[str]:
        """Return the name of what each video was made of: videos of one share a split."""

    @property
    def subjects(self) -> Sequence[str] | None:
        """Return the name of what each video shows, for ``data.balance``; None: it is not known."""

    @property
    def problems(self) -> Sequence[Problem]:
        """Return what is wrong with videos, or worth knowing."""

    def where(self, index: int) -> str:
        """Return a video's name for people, such as a path."""

    def frames(self, index: int, start: int, count: int) -> Sequence[Image.Image]:
        """Return successive frames of a video."""

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of a video."""

    def all_captions(self, index: int) -> Sequence[str]:
        """Return every caption of a video."""

    def class_label(self, index: int) -> int | None:
        """Return the class of a video."""


class Cuts:
    """Clips of `num_frames` frames, one cut at every `stride` frames of each video; shorter videos give none.

    All clips of a video share its split, and a model that was trained on one of them has seen the video.
    """

    def __init__(self, videos: Videos, num_frames: int, stride: int):
        self._videos, self.num_frames, self.problems = videos, num_frames, videos.problems
        self._cuts = [
            (video, start)
            for video, length in enumerate(videos.lengths)
            for start in range(0, length - num_frames + 1, stride)
        ]
        self.fingerprint = f"{videos.fingerprint}-cut-{num_frames}-{stride}"
        self.names = [f"{videos.names[video]}/{start}" for video, start in self._cuts]
        self.wholes = [videos.names[video] for video, _ in self._cuts]
        self.origins = [videos.origins[video] for video, _ in self._cuts]
        self.subjects = None
        if (subjects := videos.subjects) is not None:
            self.subjects = [subjects[video] for video, _ in self._cuts]

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._cuts)

    def where(self, index: int) -> str:
        """Return the clip's video and its first frame, for people."""
        video, start = self._cuts[index]
        return f"{self._videos.where(video)} from frame {start}"

    def item(self, index: int) -> Sequence[Image.Image]:
        """Return the frames of a clip in the order of time."""
        return self._videos.frames(*self._cuts[index], self.num_frames)

    def frame(self, index: int, number: int) -> Image.Image:
        """Return one frame of a clip."""
        video, start = self._cuts[index]
        return self._videos.frames(video, start + number, 1)[0]

    def image(self, index: int) -> Image.Image:
        """Return the middle frame of a clip."""
        return self.frame(index, self.num_frames // 2)

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of the clip's video."""
        return self._videos.captions(self._cuts[index][0])

    def all_captions(self, index: int) -> Sequence[str]:
        """Return every caption of the clip's video."""
        return self._videos.all_captions(self._cuts[index][0])

    def class_label(self, index: int) -> int | None:
        """Return the class of the clip's video."""
        return self._videos.class_label(self._cuts[index][0])


class Subset:
    """Some rows of a source, as a source."""

    def __init__(self, source: Source, rows: Sequence[int]):
        self._source, self._rows = source, rows
        self.num_frames, self.problems = source.num_frames, source.problems
        self.names = None if source.names is None else [source.names[row] for row in rows]
        self.origins = None if source.origins is None else [source.origins[row] for row in rows]
        self.subjects = None if source.subjects is None else [source.subjects[row] for row in rows]
        self.wholes = None if source.wholes is None else [source.wholes[row] for row in rows]
        kept = blake2b(",".join(map(str, rows)).encode(), digest_size=8).hexdigest()
        self.fingerprint = f"{source.fingerprint}-{kept}"

    def __len__(self) -> int:
        """Return the number of rows that are left."""
        return len(self._rows)

    def item(self, index: int) -> Sequence[Image.Image]:
        """Return the frames of an item."""
        return self._source.item(self._rows[index])

    def frame(self, index: int, number: int) -> Image.Image:
        """Return one frame of an item."""
        return self._source.frame(self._rows[index], number)

    def image(self, index: int) -> Image.Image:
        """Return an image in its own mode."""
        return self._source.image(self._rows[index])

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions that an image is trained with."""
        return self._source.captions(self._rows[index])

    def all_captions(self, index: int) -> Sequence[str]:
        """Return every caption."""
        return self._source.all_captions(self._rows[index])

    def class_label(self, index: int) -> int | None:
        """Return the number of the class."""
        return self._source.class_label(self._rows[index])


def _repeated(names: Sequence[str], times: int) -> list[str]:
    return [name for name in names for _ in range(times)]
