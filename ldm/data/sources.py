"""Sources of captioned images and clips: OpenMoji, a folder of images or films, Parquet, data sets of `datasets`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ldm.config import DataConfig, SourceName
from ldm.config.places import pinned
from ldm.data import layout
from ldm.data.clips import OpenMojiClips
from ldm.data.content_hashes import content_hashes, joint_hash
from ldm.data.film_folder import SUFFIXES as FILM_SUFFIXES
from ldm.data.film_folder import FilmFolder
from ldm.data.folder import FolderRows
from ldm.data.items import Cuts, Frames
from ldm.data.openmoji import OpenMoji
from ldm.data.rows import Problem, RowSource, TableRows
from ldm.errors import ConfigError, explained

OWN: tuple[SourceName, ...] = ("openmoji", "openmoji_clips")
"""Sources that are made from installed packages, and have no path."""


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


def build_source(config: DataConfig) -> Source:
    """Return the items that `config` names."""
    source = _named(config)
    return Frames(source) if config.items == "frames" else source


def _named(config: DataConfig) -> Source:
    if config.source in OWN:
        images = OpenMoji(config.image_size, config.languages, config.class_column, config.groups)
        if config.source == "openmoji":
            return images
        videos = OpenMojiClips(images, config.video_frames or config.num_frames)
        return videos if config.video_frames is None else Cuts(videos, config.num_frames, config.clip_stride)
    if config.path is None:
        raise ConfigError(f"data.path: required with data.source {config.source}")
    columns = config.image_column, config.caption_column, config.class_column
    if config.source in ("imagefolder", "videofolder") and not Path(config.path).is_dir():
        raise ConfigError(f"data.path: no folder at {config.path}")
    if config.source == "videofolder":
        rows = FolderRows(config.path, config.split, *columns, suffixes=FILM_SUFFIXES)
        films = FilmFolder(rows, config.num_frames, config.frame_rate, config.short_films)
        return Cuts(films, config.num_frames, config.clip_stride)
    if config.source == "imagefolder":
        return RowSource(FolderRows(config.path, config.split, *columns))
    with explained("data.path, data.split"):
        table, places = _table(config.source, config.path, config.split)
    return RowSource(TableRows(table, *columns, **places))


def _table(source: str, path: str, split: str) -> tuple[Any, dict[str, Any]]:
    """Return a split of a table, and the arguments `root` and `beside` of `TableRows`: the folders of its images.

    Raises:
        ValueError: there is no such split; the message lists the existing ones.

    """
    import datasets

    if source == "parquet":
        files = layout.tables(path)
        chosen = {name: files[name] for name in layout.chosen_splits(files, split)}
        root = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        real = [os.path.realpath(file) for several in chosen.values() for file in several]
        # `datasets` caches by path and mtime; a replaced file with the same two must not give its old rows
        content = joint_hash(content_hashes(os.path.realpath(root), real)).hex()
        table = datasets.load_dataset("parquet", name=content, data_files=chosen, split=split)
        beside = os.path.commonpath([os.path.dirname(file) for several in chosen.values() for file in several])
        return table, {"root": os.path.realpath(root), "beside": os.path.realpath(beside)}
    if not os.path.isdir(path):
        name, revision = pinned(path)
        return datasets.load_dataset(name, split=split, **revision), {"root": None}
    saved = datasets.load_from_disk(path)
    if not isinstance(saved, datasets.DatasetDict):
        saved = {"train": saved, str(saved.split or "train"): saved}  # a single table is "train" too
    layout.chosen_splits(saved, split)
    return saved[split], {"root": os.path.realpath(path)}


def source_config(data: str, source: SourceName | None = None, **more: Any) -> DataConfig:
    """Return the config of `data`, with the fields `more`; `source` None: it is recognised.

    `data` is one of `OWN`, a folder of images with a metadata file, a Parquet file or a folder of them, a folder that
    `datasets` saved, or the name of a data set on the Hub.
    """
    if source is None and data in OWN:
        source = data
    if source is not None:
        return DataConfig(source=source, path=None if source in OWN else data, **more)
    return DataConfig(source=layout.source_of(data), path=data, **more)
