"""A folder of pictures with a metadata file beside them.

Read by ourselves and not by `datasets`, which refuses the whole folder for one bad row, finds a missing file when
training comes to it, and leaves out silently what no row names.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.data.content_hashes import content_hashes, images_fingerprint
from ldm.data.headers import PictureError, inside
from ldm.data.rows import IMAGE_COLUMNS, Problem, find_captions, find_column

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
Row = dict[str, Any]


class FolderRows:
    """The pictures that the metadata files of a folder name, in their order.

    Bad lines, and pictures that no line names, are among the `problems`.
    """

    def __init__(
        self,
        folder: str,
        split: str = "train",
        image_column: str | None = None,
        caption_column: str | None = None,
        class_column: str | None = None,
    ):
        """Read ``folder/split`` alone if it is a folder and there is no metadata file beside it."""
        self._root = os.path.realpath(folder)
        below = os.path.join(self._root, split)
        beside = any(os.path.isfile(os.path.join(self._root, name)) for name in METADATA)
        files = list(_files(below if os.path.isdir(below) and not beside else self._root))
        found: list[tuple[str, Row]] = []
        self.problems = list(self._read([path for path in files if os.path.basename(path) in METADATA], found))
        if not found:
            why = f", such as {self.problems[0]}" if self.problems else ""
            raise ValueError(f"data.path: the metadata in {self._root} has no rows{why}")
        columns = list(dict.fromkeys(key for _, row in found for key in row))
        image_column = find_column("data.image_column", image_column, columns, IMAGE_COLUMNS)
        caption_column = find_captions(caption_column, columns)
        if class_column:
            find_column("data.class_column", class_column, columns, ())
        self._paths: list[str] = []
        self._captions: list[object] = []
        self._labels: list[object] = []
        for place, row in found:
            name = row.get(image_column)
            if not _names_a_file(name):
                self.problems.append(Problem(place, "bad row", "it names no file"))
                continue
            self._paths.append(os.path.normpath(os.path.join(os.path.dirname(place), str(name))))
            self._captions.append(row.get(caption_column) if caption_column is not None else None)
            self._labels.append(row.get(class_column) if class_column else None)
        named = set(self._paths)
        for path in map(self._relative, files):
            if path.lower().endswith(SUFFIXES) and path not in named:
                self.problems.append(Problem(path, "unlisted", "no row of the metadata names it"))

    def _read(self, files: list[str], found: list[tuple[str, Row]]) -> Iterator[Problem]:
        """Append ``(metadata file and line, row)`` to `found`, yield what is no row."""
        if not files:
            raise ValueError(f"data.path: no metadata.jsonl and no metadata.csv in {self._root}; see the README")
        for file in files:
            try:
                inside(self._root, file)
            except PictureError as error:
                yield Problem(self._relative(file), error.kind, str(error))
                continue
            for number, row in _rows(file):
                place = f"{self._relative(file)} line {number}"
                if isinstance(row, str):
                    yield Problem(place, "bad row", row)
                else:
                    found.append((place, {_column_of(key): value for key, value in row.items() if key}))

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self._root)

    @cached_property
    def fingerprint(self) -> str:
        """Name of the images' bytes, in the order of the rows; a file is read if it has changed since it was last."""
        return images_fingerprint(content_hashes(self._root, [self._readable(row) for row in range(len(self))]))

    def _readable(self, index: int) -> str | None:
        try:
            return self.file(index)
        except PictureError:
            return None

    def __len__(self) -> int:
        """Return the number of rows that name a file."""
        return len(self._paths)

    def where(self, index: int) -> str:
        """Return the picture's path relative to the folder."""
        return self._paths[index]

    def file(self, index: int) -> str:
        """Return the picture's real path, which lies in the folder."""
        return inside(self._root, self._paths[index])

    def caption_values(self) -> Iterator[object]:
        """Yield the caption, or the captions, of each row."""
        return iter(self._captions)

    def caption_value(self, index: int) -> object:
        """Return the caption, or the captions, of row `index`."""
        return self._captions[index]

    def label_value(self, index: int) -> object:
        """Return the class of row `index`; a CSV file has digits, which are a number."""
        label = self._labels[index]
        return int(label) if isinstance(label, str) and label.isdecimal() else label


def _files(folder: str) -> Iterator[str]:
    """Yield the paths of the files in a tree, hidden ones left out, in an order that does not change."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(files) if not name.startswith("."))


def _names_a_file(name: object) -> bool:
    try:
        return isinstance(name, str) and name != "" and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _column_of(key: str) -> str:
    """Return the name of a column without the ``file_name`` that marks pictures, as `datasets` has it."""
    return "image" if key == "file_name" else key.removesuffix("_file_name")


def _rows(file: str) -> Iterator[tuple[int, Row | str]]:
    """Yield the number of each line and its row, or what is wrong with it; empty lines are left out.

    Bytes that are not UTF-8 become lone surrogates, so that they are found in the one caption that has them.
    """
    if file.endswith(".parquet"):
        import datasets

        yield from enumerate(datasets.load_dataset("parquet", data_files=file, split="train"), 1)
        return
    with Path(file).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        if file.endswith(".csv"):
            table = csv.DictReader(lines)
            try:
                yield from ((table.line_num, row) for row in table)
            except csv.Error as error:
                raise ValueError(f"{file} line {table.line_num}: {error}") from error
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _json_row(line)


def _json_row(line: str) -> Row | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"a {type(row).__name__}; expected an object with file_name and caption"
