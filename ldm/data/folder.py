"""A folder of images with a metadata file beside them.

We read it ourselves, because `datasets` refuses the whole folder for one bad row, finds a missing file only when
training reaches it, and silently leaves out images that no row names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property

from ldm.data.content_hashes import content_hashes, images_fingerprint
from ldm.data.headers import ImageError, inside
from ldm.data.layout import METADATA, files_below, image_files
from ldm.data.metadata import MetadataRow, image_key, read_rows
from ldm.data.problems import Problem
from ldm.data.rows import choose_column, find_captions

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class FolderRows:
    """The rows of one split in the metadata files of a folder, in their order.

    `problems` lists bad lines, rows of images in no split, and images that no row names.
    """

    def __init__(
        self,
        folder: str,
        split: str = "train",
        image_column: str | None = None,
        caption_column: str | None = None,
        class_column: str | None = None,
        suffixes: tuple[str, ...] = SUFFIXES,
    ):
        """Read the rows of `split`, one of the splits that `image_files` finds; without splits all rows are "train".

        suffixes: ends of the names of the files that rows are of.
        """
        self.root = os.path.realpath(folder)
        files = list(files_below(self.root))
        metadata = [file for file in files if os.path.basename(file) in METADATA]
        images = [file for file in files if file.lower().endswith(suffixes)]
        rows, bad = self._read(metadata)
        columns = list(dict.fromkeys(key for _, _, row in rows for key in row))
        if not rows:
            why = f", such as {bad[0][1]}" if bad else ""
            raise ValueError(f"data.path: the metadata in {self.root} has no rows{why}")
        self.image_column = image_key(image_column, columns)
        self.caption_column = find_captions(caption_column, columns, self.image_column)
        if class_column:
            choose_column("data.class_column", class_column, columns)
        named = [self._path(file, row.get(self.image_column)) for file, _, row in rows]
        within = (path for path in named if path and not _leads_out(path))  # the others are not of this folder
        splits = image_files(self.root, list(dict.fromkeys([*metadata, *images, *within])))
        if split not in splits:
            raise ValueError(f"data.split: no split {split!r}; there are: {', '.join(splits)}")
        members = set(splits[split])
        others = {file for found in splits.values() for file in found} - members
        self.problems = [problem for file, problem in bad if file not in others]
        self._paths: list[str] = []
        self._captions: list[object] = []
        self._labels: list[object] = []
        for (file, number, row), path in zip(rows, named, strict=True):
            decides = file if file in members or file in others else path
            if decides in others:
                continue
            if path is None:
                self.problems.append(Problem(f"{file} line {number}", "bad row", "it names no file"))
            elif decides not in members and not _leads_out(path):
                self.problems.append(Problem(path, "in no split", f"it is in none of the splits {', '.join(splits)}"))
            else:
                self._paths.append(path)
                self._captions.append(row.get(self.caption_column) if self.caption_column is not None else None)
                self._labels.append(row.get(class_column) if class_column else None)
        if not self._paths and not any(problem.stops for problem in self.problems):
            raise ValueError(f"data.split: no row of the metadata in {self.root} is of an image in {split!r}")
        unlisted = members.difference(named)
        for path in images:
            if path in unlisted:
                self.problems.append(Problem(path, "unlisted", "no row of the metadata names it"))

    def _read(self, metadata: list[str]) -> tuple[list[tuple[str, int, MetadataRow]], list[tuple[str, Problem]]]:
        """Return each row with its file and line, and each problem with its file."""
        if not metadata:
            raise ValueError(f"data.path: no metadata.jsonl and no metadata.csv in {self.root}; see the README")
        rows, bad = [], []
        for file in metadata:
            try:
                path = inside(self.root, file)
            except ImageError as error:
                bad.append((file, Problem(file, error.kind, str(error))))
                continue
            for number, row in read_rows(path):
                if isinstance(row, str):
                    bad.append((file, Problem(f"{file} line {number}", "bad row", row)))
                else:
                    rows.append((file, number, row))
        return rows, bad

    def _path(self, metadata: str, name: object) -> str | None:
        """Return the path, relative to the folder, of a file that `metadata` names; None if `name` names no file.

        Paths that lead out of the folder stay unchanged and are refused when they are opened. Backslashes are
        separators, as in `datasets`.
        """
        if not _names_a_file(name):
            return None
        name = str(name).replace("\\", "/")
        if os.path.isabs(name):
            name = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
            below = name.startswith(os.path.join(self.root, ""))
            return os.path.relpath(name, self.root) if below else name
        return os.path.normpath(os.path.join(os.path.dirname(metadata), name))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images' bytes in the order of the rows; only files that have changed are read."""
        return images_fingerprint(content_hashes(self.root, [self._readable(row) for row in range(len(self))]))

    def _readable(self, index: int) -> str | None:
        try:
            return self.file(index)
        except ImageError:
            return None

    def __len__(self) -> int:
        """Return the number of rows that name a file."""
        return len(self._paths)

    def where(self, index: int) -> str:
        """Return the image's path relative to the folder."""
        return self._paths[index]

    def file(self, index: int) -> str:
        """Return the image's real path; ImageError if it is missing or outside the folder."""
        return inside(self.root, self._paths[index])

    def caption_values(self) -> Iterator[object]:
        """Yield the caption, or the captions, of each row."""
        return iter(self._captions)

    def caption_value(self, index: int) -> object:
        """Return the caption, or the captions, of row `index`."""
        return self._captions[index]

    def label_value(self, index: int) -> object:
        """Return the class of row `index`; digits, as in a CSV file, become an int."""
        label = self._labels[index]
        return int(label) if isinstance(label, str) and label.isdecimal() else label


def _leads_out(path: str) -> bool:
    return os.path.isabs(path) or path.split(os.sep)[0] == ".."


def _names_a_file(name: object) -> bool:
    try:
        return isinstance(name, str) and name != "" and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False
