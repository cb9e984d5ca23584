"""Where captioned pictures come from: OpenMoji, a folder, Parquet files, any data set of `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ldm.config import DataConfig
from ldm.data.openmoji import OpenMoji

IMAGE_COLUMNS = ("image", "images", "picture", "img", "jpg", "png", "webp")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "prompts", "description", "txt")
FILE_TYPES = ("binary", "large_binary", "string", "large_string")
"""Of a column that holds the bytes or the paths of image files."""


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
        """Return the number of its class, None if the data has none."""


class TableSource:
    """Rows of a map-style `datasets.Dataset`, an image column and a caption column (a string or a list of them)."""

    names = None

    def __init__(
        self, table: Any, image_column: str | None, caption_column: str | None, class_column: str | None = None
    ):
        columns = table.column_names
        self.image_column = _column("data.image_column", image_column, columns, IMAGE_COLUMNS)
        self.caption_column = _column("data.caption_column", caption_column, columns, CAPTION_COLUMNS)
        self._table = _with_pictures(table, self.image_column)
        self._captions = table[self.caption_column]
        self._labels = table[_column("data.class_column", class_column, columns, ())] if class_column else None
        self.fingerprint = f"table-{self._table._fingerprint}"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._table)

    def image(self, index: int) -> Image.Image:
        """Return the picture of row `index`; raises ValueError with the row if it is missing or cannot be decoded."""
        try:
            image: Image.Image | None = self._table[index][self.image_column]
            if image is None:
                raise ValueError(f"row {index} has no picture; leave it out of the data")
            image.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"the picture of row {index} cannot be read: {error}") from error
        return image

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of row `index`; null and empty ones are left out."""
        value = self._captions[index]
        texts = value if isinstance(value, list | tuple) else [value]
        return tuple(str(text).strip() for text in texts if text is not None and str(text).strip())

    all_captions = captions

    def class_label(self, index: int) -> int | None:
        """Return the class of row `index`; raises ValueError unless it is a whole number."""
        label = None if self._labels is None else self._labels[index]
        if label is not None and (not isinstance(label, int) or isinstance(label, bool)):
            raise ValueError(f"data.class_column: row {index} has a {type(label).__name__}; expected a whole number")
        return label


def build_source(config: DataConfig) -> Source:
    """Return the pictures that `config` names."""
    if config.source == "openmoji":
        return OpenMoji(config.image_size, config.languages)
    if config.path is None:
        raise ValueError(f"data.path: required with data.source {config.source}")
    import datasets

    if config.source == "imagefolder":
        if not Path(config.path).is_dir():
            raise FileNotFoundError(f"data.path: no folder at {config.path}")
        table = datasets.load_dataset("imagefolder", data_dir=config.path, split=config.split)
    elif config.source == "parquet":
        files = sorted(map(str, Path(config.path).glob("*.parquet"))) if Path(config.path).is_dir() else config.path
        table = datasets.load_dataset("parquet", data_files=files, split=config.split)
    elif Path(config.path).is_dir():
        table = datasets.load_from_disk(config.path)
        table = table[config.split] if isinstance(table, datasets.DatasetDict) else table
    else:
        table = datasets.load_dataset(config.path, split=config.split)
    return TableSource(table, config.image_column, config.caption_column, config.class_column)


def _with_pictures(table: Any, column: str) -> Any:
    """Return the table with pictures in `column`; raises ValueError if it holds neither pictures nor image files.

    Parquet files that were not written by `datasets` hold the bytes of image files, or a struct of bytes and path.
    """
    import datasets

    feature = table.features[column]
    if isinstance(feature, datasets.Image) and feature.decode:
        return table
    is_struct = isinstance(feature, dict) and bool(feature.keys() & {"bytes", "path"})
    if not (is_struct or isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in FILE_TYPES):
        raise ValueError(f"data.image_column: {column!r} holds {feature}; expected pictures, or bytes of image files")
    return table.cast_column(column, datasets.Image())


def _column(key: str, wanted: str | None, columns: Sequence[str], usual: Sequence[str]) -> str:
    if wanted is not None and wanted in columns:
        return wanted
    found = None if wanted else next((name for name in usual if name in columns), None)
    if found is None:
        what = f"no column {wanted!r}" if wanted else f"none of the usual names {', '.join(usual)}"
        raise ValueError(f"{key}: {what} among the columns {', '.join(columns)}; name the right one")
    return found
