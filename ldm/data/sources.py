"""Sources of captioned images and clips: OpenMoji, a folder of images or films, Parquet, data sets of `datasets`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ldm.config import DataConfig, SourceName
from ldm.config.places import pinned
from ldm.data import layout
from ldm.data.clips import OpenMojiClips
from ldm.data.content_hashes import content_hashes, joint_hash
from ldm.data.film_folder import SUFFIXES as FILM_SUFFIXES
from ldm.data.film_folder import FilmFolder
from ldm.data.folder import FolderRows
from ldm.data.items import Cuts, Frames, Source
from ldm.data.openmoji import OpenMoji
from ldm.data.rows import RowSource, TableRows
from ldm.errors import ConfigError, explained

OWN: tuple[SourceName, ...] = ("openmoji", "openmoji_clips")
"""Sources that are made from installed packages, and have no path."""


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
