"""Captioned images in rows of tables and metadata files; they come from others, so anything in them may be wrong."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, BinaryIO, Protocol, cast

import torch
from PIL import Image
from torch import Tensor

from ldm.data.cache import CachedRows
from ldm.data.content_hashes import DIGEST_SIZE, content_hash, content_hashes, images_fingerprint
from ldm.data.headers import ImageError, decode_pixels, inside, open_image
from ldm.data.items import Stills
from ldm.data.problems import Problem, label_fault

log = logging.getLogger(__name__)
IMAGE_COLUMNS = ("image", "images", "picture", "img", "jpg", "png", "webp")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "prompts", "description", "txt")
BYTES = ("binary", "large_binary", "binary_view")
"""Types of a column that holds image files."""
PATHS = ("string", "large_string", "string_view")
"""Types of a column that holds the paths of image files."""


class Rows(Protocol):
    """Rows of images and captions with their values unchecked: a table's, or those of a folder's metadata."""

    image_column: str
    caption_column: str | None

    @property
    def fingerprint(self) -> str:
        """Return a hash of the images' bytes in the order of the rows, and of nothing else."""

    @property
    def problems(self) -> Sequence[Problem]:
        """Return the problems that were found while the rows were read."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def where(self, index: int) -> str:
        """Return the place of row `index` for messages, such as a path."""

    def file(self, index: int) -> str | BinaryIO:
        """Return the path or the bytes of an image; ImageError if there is none or it may not be read."""

    def caption_values(self) -> Iterator[object]:
        """Yield the value of the caption column, row by row."""

    def caption_value(self, index: int) -> object:
        """Return the value of the caption column in row `index`."""

    def label_value(self, index: int) -> object:
        """Return the value of the class column in row `index`, None without such a column."""


class RowSource(Stills):
    """A `Source` made of rows; `where` gives the place of each image."""

    names = None

    def __init__(self, rows: Rows):
        self.rows, self.problems, self.where = rows, rows.problems, rows.where

    @property
    def fingerprint(self) -> str:
        """Return a hash of the images' bytes; all of them may be read for it."""
        return self.rows.fingerprint

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def header(self, index: int) -> Image.Image:
        """Return an image that is not decoded yet; errors as of `open_image` and `Rows.file`."""
        return open_image(self.rows.file(index))

    def image(self, index: int) -> Image.Image:
        """Return the image of row `index`; ImageError, which names its place, if it cannot be read."""
        try:
            return decode_pixels(self.header(index))
        except ImageError as error:
            raise ImageError(f"{self.where(index)}: the image cannot be read: {error}", error.kind) from error

    def captions(self, index: int) -> Sequence[str]:
        """Return the captions of row `index`; null and empty ones are left out."""
        return texts(self.rows.caption_value(index))

    def all_captions(self, index: int) -> Sequence[str]:
        """Return the captions of row `index`: rows have no others."""
        return self.captions(index)

    def class_label(self, index: int) -> int | None:
        """Return the class of row `index`, None if there is none; ValueError if it is no whole number, 0 or more."""
        label = self.rows.label_value(index)
        if label is None:
            return None
        if reason := label_fault(label):
            raise ValueError(f"data.class_column: {self.where(index)}: {reason}")
        return cast(int, label)


class TableRows:
    """The rows of a map-style `datasets.Dataset`; a caption is a string or a list of strings."""

    problems: Sequence[Problem] = ()

    def __init__(
        self,
        table: Any,
        image_column: str | None,
        caption_column: str | None,
        class_column: str | None = None,
        root: str | None = None,
        beside: str = "",
    ):
        """Read image files only from folder `root`, a real path; None: from the caches of the Hub's libraries.

        Paths in the table are relative to the folder `beside`, itself relative to `root`. A format that was set on the
        table is ignored.
        """
        import datasets

        if table.format["type"] is not None or table.format["columns"] != table.column_names:
            table = table.with_format(None)  # it may have been saved with one, such as "torch"
        columns = table.column_names
        self.image_column = _images_of(table.features, image_column)
        self.caption_column = find_captions(caption_column, columns, self.image_column)
        if not isinstance(feature := table.features[self.image_column], datasets.Image):
            table = _with_images(table, self.image_column, feature)
        self.root, self.beside = root, beside
        self._images = table.select_columns([self.image_column]).with_format("arrow")
        self._captions = table[self.caption_column] if self.caption_column is not None else [None] * len(table)
        self._labels = table[choose_column("data.class_column", class_column, columns)] if class_column else None
        self._table = table

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._images)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images' bytes in the order of the rows; they are read only if the table has changed."""
        cells = CachedRows("image-hashes", self._state(), len(self), self._cell_hashes).column("hash").numpy()
        hashes: list[bytes | None] = [cell.tobytes() if cell.any() else None for cell in cells]
        files = [row for row, value in enumerate(hashes) if value is None]
        for row, value in zip(files, content_hashes(self.root or "", list(map(self._path, files))), strict=True):
            hashes[row] = value
        return images_fingerprint(hashes)

    def _state(self) -> str:
        """Return a name of the table and of its files' states: the files may be replaced while the table stays."""
        files = [file["filename"] for file in self._table.cache_files]
        states = [os.stat(file) for file in files if os.path.exists(file)]
        times = [f"{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}-{state.st_ino}" for state in states]
        return "/".join([self._table._fingerprint, self.image_column, *times])

    def _cell_hashes(self, rows: range) -> dict[str, Tensor]:
        """Return the hash of each row's image bytes, zeros for a row without bytes."""
        cells = self._images[rows.start : rows.stop][self.image_column]
        hashes = [
            content_hash(memoryview(cell["bytes"].as_buffer())) if cell.is_valid and cell["bytes"].is_valid else None
            for cell in cells
        ]
        table = b"".join(value or bytes(DIGEST_SIZE) for value in hashes)
        return {"hash": torch.frombuffer(bytearray(table), dtype=torch.uint8).view(-1, DIGEST_SIZE)}

    def _path(self, index: int) -> str | None:
        """Return the path of the image file of row `index`; None if it has none, or it may not be read."""
        try:
            file = self.file(index)
        except (ValueError, OSError):
            return None
        return file if isinstance(file, str) else None

    def where(self, index: int) -> str:
        """Return "row" and its number."""
        return f"row {index}"

    def file(self, index: int) -> str | BinaryIO:
        """Return the bytes of the image, mapped and not yet read, or the path of its file."""
        from pyarrow import BufferReader

        cell = self._images[index][self.image_column][0]
        if cell.is_valid and cell["bytes"].is_valid:
            data: BinaryIO = BufferReader(cell["bytes"].as_buffer())
            return data
        path: str | None = cell["path"].as_py() if cell.is_valid else None
        if path is None:
            raise ImageError("the row has no image", "missing")
        return _downloaded(path) if self.root is None else inside(self.root, os.path.join(self.beside, path))

    def caption_values(self) -> Iterator[object]:
        """Yield the captions of each row."""
        return iter(self._captions)

    def caption_value(self, index: int) -> object:
        """Return the caption, or the captions, of row `index`."""
        return self._captions[index]

    def label_value(self, index: int) -> object:
        """Return the class of row `index`."""
        return None if self._labels is None else self._labels[index]


def _downloaded(path: str) -> str:
    """Return the real path of a file that was downloaded from the Hub; ImageError for any other file of this machine.

    A row could name any file.
    """
    import datasets
    from huggingface_hub import constants

    config, real = datasets.config, os.path.realpath(path)
    caches = config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE
    roots = [os.path.realpath(cache) for cache in caches]
    return inside(next((root for root in roots if real.startswith(os.path.join(root, ""))), roots[0]), path)


def _images_of(features: Any, wanted: str | None) -> str:
    """Return the image column: `wanted`, else the one of type Image, else a usual name (bytes before paths)."""
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    usual = [name for name in IMAGE_COLUMNS if name in features]
    groups = [name for name in usual if name in images], images, [name for name in usual if _is_bytes(features[name])]
    return choose_column("data.image_column", wanted, list(features), *groups, IMAGE_COLUMNS)


def _is_bytes(feature: Any) -> bool:
    """Return True if a column holds bytes, or a struct of bytes and path."""
    if isinstance(feature, dict):
        return bool(feature.keys() & {"bytes", "path"})
    return getattr(feature, "dtype", None) in BYTES


def _with_images(table: Any, column: str, feature: Any) -> Any:
    """Return the table with `column` cast to images; ValueError if it holds no image files.

    Parquet files of other writers than `datasets` hold the bytes of image files, or a struct of bytes and path.
    """
    import datasets

    kind = getattr(feature, "dtype", "")
    if not _is_bytes(feature) and kind not in PATHS:
        raise ValueError(f"data.image_column: {column!r} holds {feature}; expected images, or bytes of image files")
    if kind.endswith("_view"):  # written by polars; it can be cast to this type only
        table = table.cast_column(column, datasets.Value(kind.removesuffix("_view")))
    return table.cast_column(column, datasets.Image())


def texts(value: object) -> tuple[str, ...]:
    """Return the captions in a caption column's value; null and empty ones are left out."""
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(str(text).strip() for text in several if text is not None and str(text).strip())


def find_captions(wanted: str | None, columns: Sequence[str], images: str) -> str | None:
    """Return the caption column: `wanted`, else one with a usual name other than `images`; None if there is none."""
    usual = [name for name in CAPTION_COLUMNS if name != images]
    if wanted is None and not set(columns) & set(usual):
        return None
    return choose_column("data.caption_column", wanted, columns, usual)


def choose_column(key: str, wanted: str | None, columns: Sequence[str], *usual: Sequence[str]) -> str:
    """Return the column `wanted`, else the only one in the first of the `usual` groups that has any, and log it.

    Raises:
        ValueError: there is no such column; or none is wanted and the group has several.

    """
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{key}: no column {wanted!r} among the columns {', '.join(columns)}; name the right one")
        return wanted
    found = next((some for group in usual if (some := [name for name in group if name in columns])), [])
    if len(found) == 1:
        log.info("%s: %r, by its name", key, found[0])
        return found[0]
    what = f"any of {', '.join(found)} may be it" if found else f"none of the usual names {', '.join(usual[-1])}"
    raise ValueError(f"{key}: {what} among the columns {', '.join(columns)}; name the right one")
