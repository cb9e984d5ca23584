"""A folder of films with a metadata file beside them: what is wrong with each, and its frames."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal

from PIL import Image

from ldm.data.content_hashes import content_hashes, joint_hash
from ldm.data.films import ANIMATIONS, Film, at_rate, film_at
from ldm.data.folder import FolderRows
from ldm.data.headers import ImageError
from ldm.data.layout import FILMS
from ldm.data.problems import Problem, caption_fault
from ldm.data.rows import texts
from ldm.terminal import progress_bar

SUFFIXES = (*ANIMATIONS, *FILMS)


class FilmFolder:
    """The films that the rows of a folder name, as `ldm.data.items.Videos`.

    `problems` lists the films that no clip can be cut from, whose length is 0, and those of the metadata. Each film is
    known by the hash of its bytes: one with another name is the same film.
    """

    subjects = None

    def __init__(
        self,
        rows: FolderRows,
        num_frames: int,
        frame_rate: float | None = None,
        short: Literal["error", "loop"] = "error",
    ):
        """Look at every film: at its times, and its frames where it is an animation.

        frame_rate: frames a second, for each moment the one that is shown then; None: all frames. short: films of fewer
        than `num_frames` are problems; or begin again at their end until they have as many.
        """
        self._rows, self._num_frames = rows, num_frames
        self.problems = [*rows.problems]
        self._films: list[Film | None] = []
        self._numbers: list[array[int]] = []
        files: list[str | None] = []
        with progress_bar(len(rows), "looking at films", "film") as bar:
            for row in range(len(rows)):
                film, numbers = self._looked_at(row, frame_rate, short)
                files.append(None if film is None else film.path)
                self._films.append(film)
                self._numbers.append(array("l", numbers))
                bar.update()
        hashes = content_hashes(rows.root, files)
        self.names = [f"film-{row}" if value is None else value.hex() for row, value in enumerate(hashes)]
        self.origins = self.names
        lengths = joint_hash([len(numbers).to_bytes(8, "big") for numbers in self._numbers]).hex()
        self.fingerprint = f"{rows.fingerprint}-{num_frames}-{frame_rate}-{short}-{lengths}"

    @property
    def lengths(self) -> Sequence[int]:
        """The number of frames of each film at the frame rate; 0 of one that cannot be read."""
        return [len(numbers) for numbers in self._numbers]

    def __len__(self) -> int:
        """Return the number of films."""
        return len(self._rows)

    def where(self, index: int) -> str:
        """Return a film's path relative to the folder."""
        return self._rows.where(index)

    def frames(self, index: int, start: int, count: int) -> Sequence[Image.Image]:
        """Return successive frames of a film; ImageError, which names it, if they cannot be read."""
        wanted, film = self._numbers[index][start : start + count], self._films[index]
        if film is None:
            raise ValueError(f"{self.where(index)}: no clip can be cut from it; see the problems")
        try:
            # a film that begins again: its frames are read in their order, and shown in that of the clip
            frames = dict(zip(sorted({*wanted}), film.frames(sorted({*wanted})), strict=True))
        except ImageError as error:
            raise ImageError(f"{self.where(index)}: {error}", error.kind) from error
        return [frames[number] for number in wanted]

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of a film; null and empty ones are left out."""
        return texts(self._rows.caption_value(index))

    def all_captions(self, index: int) -> Sequence[str]:
        """Return the captions of a film: there are no others."""
        return self.captions(index)

    def class_label(self, index: int) -> int | None:
        """Return None: films have no classes here."""
        return None

    def _looked_at(self, row: int, frame_rate: float | None, short: str) -> tuple[Film | None, Sequence[int]]:
        """Return a film and the numbers of its frames at the frame rate, none if it has a problem, which is added."""

        def problem(kind: str, reason: str) -> tuple[None, Sequence[int]]:
            self.problems.append(Problem(self.where(row), kind, reason, None))
            return None, ()

        caption = self._rows.caption_value(row)
        if reason := caption_fault(caption):
            return problem("bad caption", reason)
        try:
            film = film_at(self._rows.file(row))
            numbers = at_rate(film.times(), frame_rate)
        except ImageError as error:
            return problem(error.kind, str(error))
        except OSError as error:
            return problem("unreadable", error.strerror or str(error))
        if not texts(caption):
            problem("no caption", "it will be trained unconditionally")
        if len(numbers) < self._num_frames and short == "error":
            frames = f"{len(numbers)} frames at the frame rate; expected {self._num_frames} or more"
            return problem("too short", f"{frames}, or data.short_films: loop")
        return film, [numbers[number % len(numbers)] for number in range(max(len(numbers), self._num_frames))]
