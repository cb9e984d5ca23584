"""Where captioned pictures come from: OpenMoji, a folder, Parquet files, any data set of `datasets`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ldm.config import DataConfig, SourceName
from ldm.config_check import explained
from ldm.data.folder import METADATA, FolderRows
from ldm.data.openmoji import OpenMoji
from ldm.data.rows import RowSource, TableRows
from ldm.places import pinned


class Source(Protocol):
    """Captioned pictures by index."""

    fingerprint: str
    """Names the pictures: equal fingerprints, equal pictures."""

    @property
    def names(self) -> Sequence[str] | None:
        """A name of each picture that outlives changes of its last bits, None if there is none but its pixels."""

    def __len__(self) -> int:
        """Return the number of pictures."""

    def image(self, index: int) -> Image.Image:
        """Return a picture in whatever mode it has."""

    def captions(self, index: int) -> Sequence[str]:
        """Return its captions to choose from, possibly none."""

    def all_captions(self, index: int) -> Sequence[str]:
        """Return every caption it is known by, also those not chosen: what held-out lists are matched with."""

    def class_label(self, index: int) -> int | None:
        """Return the number of its class, `UNKNOWN_CLASS` if it has none of them; None if the data has no classes."""


class Subset:
    """Some rows of a source, as a source."""

    def __init__(self, source: Source, rows: Sequence[int]):
        self._source, self._rows = source, rows
        self.names = None if source.names is None else [source.names[row] for row in rows]
        kept = blake2b(",".join(map(str, rows)).encode(), digest_size=8).hexdigest()
        self.fingerprint = f"{source.fingerprint}-{kept}"

    def __len__(self) -> int:
        """Return the number of rows that are left."""
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        """Return a picture in whatever mode it has."""
        return self._source.image(self._rows[index])

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions to choose from."""
        return self._source.captions(self._rows[index])

    def all_captions(self, index: int) -> Sequence[str]:
        """Return every caption."""
        return self._source.all_captions(self._rows[index])

    def class_label(self, index: int) -> int | None:
        """Return the number of the class."""
        return self._source.class_label(self._rows[index])


def build_source(config: DataConfig) -> Source:
    """Return the pictures that `config` names."""
    if config.source == "openmoji":
        return OpenMoji(config.image_size, config.languages, config.class_column)
    if config.path is None:
        raise ValueError(f"data.path: required with data.source {config.source}")
    columns = config.image_column, config.caption_column, config.class_column
    if config.source == "imagefolder":
        if not Path(config.path).is_dir():
            raise FileNotFoundError(f"data.path: no folder at {config.path}")
        return RowSource(FolderRows(config.path, config.split, *columns))
    import datasets

    root: str | None = os.path.realpath(config.path)  # pictures that are files beside the table must lie in it
    with explained("data.path, data.split"):
        if config.source == "parquet":
            files = sorted(map(str, Path(config.path).glob("*.parquet"))) if Path(config.path).is_dir() else config.path
            table = datasets.load_dataset("parquet", data_files=files, split=config.split)
        elif Path(config.path).is_dir():
            table = datasets.load_from_disk(config.path)
            table = table[config.split] if isinstance(table, datasets.DatasetDict) else table
        else:
            name, revision = pinned(config.path)
            table, root = datasets.load_dataset(name, split=config.split, **revision), None
    return RowSource(TableRows(table, *columns, root=root))


def source_config(data: str, source: SourceName | None = None, **more: Any) -> DataConfig:
    """Return the config, with values `more`, of what `data` names, read as `source` if that is given.

    That is "openmoji", a folder of pictures with a metadata file, a Parquet file or a folder of them, a folder that
    `datasets` saved, or else the name of a data set.
    """
    path = Path(data)
    if source is not None:
        return DataConfig(source=source, path=None if source == "openmoji" else data, **more)
    if data == "openmoji":
        return DataConfig(**more)
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return DataConfig(source="dataset", path=data, **more)
    tables = {file.name for file in path.glob("*.parquet")} if path.is_dir() else set()
    if path.suffix == ".parquet" or (tables and not tables & set(METADATA)):
        return DataConfig(source="parquet", path=data, **more)
    return DataConfig(source="imagefolder" if path.is_dir() else "dataset", path=data, **more)
