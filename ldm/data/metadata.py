"""Metadata files of image folders: the rows in JSON Lines, CSV or Parquet, and the column that names the images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ldm.data.rows import CAPTION_COLUMNS, IMAGE_COLUMNS, choose_column
from ldm.files import open_text

MARK = "file_name"
"""End of the key of a column of files, as in `datasets`: "file_name" is the column "image", "mask_file_name" "mask"."""
MetadataRow = dict[str, Any]


def read_rows(file: str) -> Iterator[tuple[int, MetadataRow | str]]:
    """Yield each line's number and its row, or a string that says what is wrong; empty lines are left out.

    Bytes that are not UTF-8 become lone surrogates, so that only the caption that has them is found bad.
    """
    if file.endswith(".parquet"):
        yield from _parquet_rows(file)
        return
    number = 0
    with open_text(file, errors="surrogateescape", newline="") as lines:
        try:
            for number, row in _csv_rows(lines) if file.endswith(".csv") else _json_rows(lines):
                yield number, row
        except UnicodeError:
            yield number + 1, f"not text in {lines.encoding.upper()}; the rest is not read"


def image_key(wanted: str | None, keys: Sequence[str]) -> str:
    """Return the key of the image files: `wanted`, with or without `MARK`, else the key that `datasets` reads.

    If no key has the mark, one of the usual names is taken. ValueError if there is none, or several are possible.
    """
    if wanted is not None:
        marked = MARK if wanted == "image" else f"{wanted}_{MARK}"
        return choose_column("data.image_column", marked if wanted not in keys and marked in keys else wanted, keys)
    first = MARK, f"image_{MARK}"
    usual = [f"{name}_{MARK}" for name in IMAGE_COLUMNS if f"{name}_{MARK}" not in first]
    texts = {f"{name}_{MARK}" for name in CAPTION_COLUMNS}  # columns of files too, but not of images
    others = [key for key in keys if key.endswith(f"_{MARK}") and key not in texts]
    return choose_column("data.image_column", None, keys, first, usual, [*IMAGE_COLUMNS, *others])


def _json_rows(lines: Iterator[str]) -> Iterator[tuple[int, MetadataRow | str]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _json_row(line)


def _json_row(line: str) -> MetadataRow | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"a {type(row).__name__}; expected an object with file_name and caption"


def _csv_rows(lines: Iterator[str]) -> Iterator[tuple[int, MetadataRow | str]]:
    table = csv.DictReader(lines, strict=True)
    try:
        columns = list(table.fieldnames or [])
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            yield 1, f"several columns are called {twice[0]!r}; the rest is not read"
            return
        for row in table:
            if None in row:
                yield table.line_num, f"more fields than the {len(columns)} columns; quote texts that have commas"
            else:
                yield table.line_num, {key: value for key, value in row.items() if key}
    except csv.Error as error:
        yield table.line_num, f"not CSV: {error}; the rest is not read"


def _parquet_rows(file: str) -> Iterator[tuple[int, MetadataRow | str]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield number + 1, f"not Parquet: {error}; the rest is not read"
