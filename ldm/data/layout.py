"""The splits of a folder's files, read from their names as `datasets` does."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from fsspec.utils import glob_translate  # type: ignore[import-untyped]
from huggingface_hub import DatasetCard

log = logging.getLogger(__name__)
FILMS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
"""Ends of the names of films that PyAV reads."""
STILLS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files that `save_to_disk` writes."""
SplitFiles = dict[str, list[str]]
"""Relative paths of the files of each split."""


def files_below(folder: str) -> Iterator[str]:
    """Yield the relative paths of all files below a folder, in a fixed order.

    Hidden files and folders are left out, and folders whose names begin with two underscores.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(parent, name), folder)


def source_of(path: str) -> Literal["imagefolder", "videofolder", "parquet", "dataset"]:
    """Return the kind of data at `path`; "dataset" if there is no such path: the name of a data set.

    In a folder with both tables and metadata files, the file nearest to the root decides. With metadata, a folder with
    films (but for GIF and WEBP, which may be images) and without still images is one of videos.
    """
    if path.endswith(".parquet"):
        return "parquet"
    if not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, name)) for name in SAVED):
        return "dataset"
    depths: dict[bool, int] = {}
    films = stills = False
    for file in files_below(path):
        films, stills = films or file.lower().endswith(FILMS), stills or file.lower().endswith(STILLS)
        is_metadata = os.path.basename(file) in METADATA
        if is_metadata or file.endswith(".parquet"):
            depth = file.count(os.sep)
            depths[is_metadata] = min(depth, depths.get(is_metadata, depth))
    if False in depths and depths[False] < depths.get(True, depths[False] + 1):
        return "parquet"
    return "videofolder" if films and not stills else "imagefolder"


def tables(path: str) -> SplitFiles:
    """Return the paths of the Parquet files of each split of a folder; a single file is "train".

    Raises:
        ValueError: there are none.

    """
    if os.path.isfile(path):
        return {"train": [path]}
    names = [name for name in files_below(path) if name.endswith(".parquet")]
    if not names:
        raise ValueError(f"no Parquet files in {path}")
    found = by_card(path, names) or by_shard(names) or by_folder(names) or by_file_name(names) or {"train": names}
    return {split: [os.path.join(path, name) for name in files] for split, files in found.items()}


def image_files(folder: str, names: Sequence[str]) -> SplitFiles:
    """Return the files of each split of a folder; `names` are its image and metadata files.

    It differs from `datasets` in two ways. First, names of image files (test-1.png) define splits only if every image
    has such a name: one test-tube.png among a thousand other images is no split. Second, metadata outside the splits,
    such as in the folder above train/ and test/, is read: its rows belong to the splits of their images.
    """
    found = by_card(folder, names) or by_folder(names)
    if found:
        return found
    images = [name for name in names if os.path.basename(name) not in METADATA]
    found = by_file_name(images)
    without = set(images).difference(*found.values())
    if found and without:
        one, other = next(iter(found.values()))[0], min(without)
        log.warning("%s looks like split %s by its name, %s like none: all are train", one, next(iter(found)), other)
        return {"train": list(names)}
    return found or {"train": list(names)}


def by_card(folder: str, names: Sequence[str]) -> SplitFiles:
    """Return the splits in the ``configs`` of the folder's README.md, none if there are none.

    Raises:
        ValueError: there are several configs and none is the default.

    """
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs

    card = os.path.join(folder, "README.md")
    if not os.path.isfile(card):
        return {}
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)
    except Exception:  # any file may be called README.md; if it is no card, it defines no splits
        return {}
    if not configs:
        return {}
    default = configs.get_default_config_name()
    if default is None:
        known = ", ".join(sorted(configs))
        raise ValueError(f"{card} names the configs {known} and no default: name the folder or the file of one")
    patterns = configs[default].get("data_files")
    return {} if patterns is None else _matching(names, sanitize_patterns(patterns))


def by_shard(names: Sequence[str]) -> SplitFiles:
    """Return the splits of files called ``data/SPLIT-00000-of-00001.*``, none if there are none."""
    from datasets.data_files import SPLIT_PATTERN_SHARDED as PATTERN

    found = [re.match(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.", name) for name in names]
    return _matching(names, {match[1]: [PATTERN.format(split=match[1])] for match in found if match})


def by_folder(names: Sequence[str]) -> SplitFiles:
    """Return the splits by the names of the files' folders, none if no folder is named like a split."""
    from datasets.data_files import DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME as PATTERNS

    folders = _matching(dict.fromkeys(f"{os.path.dirname(name)}/" for name in names), PATTERNS)
    members = ((split, set(found)) for split, found in folders.items())
    return {split: [name for name in names if f"{os.path.dirname(name)}/" in chosen] for split, chosen in members}


def by_file_name(names: Sequence[str]) -> SplitFiles:
    """Return the splits by the names of the files, none if no file is named like a split."""
    from datasets.data_files import DEFAULT_PATTERNS_SPLIT_IN_FILENAME as PATTERNS

    return _matching(names, PATTERNS)


def chosen_splits(splits: Mapping[str, object], wanted: str) -> list[str]:
    """Return the splits that `wanted` names (train, train[:10%], train+test); ValueError if one is unknown."""
    names = [part.partition("[")[0].strip() for part in wanted.split("+")]
    if unknown := [name for name in names if name not in splits]:
        raise ValueError(f"no split {unknown[0]!r}; there are: {', '.join(splits)}")
    return names


def _matching(names: Iterable[str], patterns: Mapping[Any, Sequence[str]]) -> SplitFiles:
    """Return for each split the names that match one of its patterns; splits without names are left out."""
    names = list(names)
    found = {}
    for split, several in patterns.items():
        pattern = re.compile("|".join(map(glob_translate, several)))
        if matched := [name for name in names if pattern.match(name)]:
            found[str(split)] = matched
    return found
