"""A cache on disk for rows of tensors that are slow to compute, shared by all runs."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.data.cache_folder import entry_folder
from ldm.data.content_hashes import content_hashes, file_hash
from ldm.files import locked, put_in_place, written_aside
from ldm.terminal import progress_bar

log = logging.getLogger(__name__)

ROWS_PER_SHARD = 1024
_SHARD = re.compile(r"(\d{9})-([0-9a-f]{32})\.safetensors")
"""Its first row and the hash of its bytes."""
Compute = Callable[[range], dict[str, Tensor]]


class CachedRows:
    """``count`` rows of named tensors in safetensors shards, memory-mapped: memory stays flat as the set grows.

    `key` must name everything the rows depend on (data, transform, network). Missing and damaged shards are computed
    one after another, so that an interrupted build goes on where it stopped. A shard's file name contains the hash of
    its bytes; the hash is checked again when the file has changed.
    """

    def __init__(self, kind: str, key: str, count: int, compute: Compute, rows_per_shard: int = ROWS_PER_SHARD):
        self.folder = entry_folder(kind, f"{key}/{count}/{rows_per_shard}")
        self.kind, self.rows_per_shard = kind, rows_per_shard
        starts = range(0, count, rows_per_shard)
        found = self._sound_shards()
        if missing := [start for start in starts if start not in found]:
            found |= self._build(missing, count, compute)
        if len(found) < len(starts):
            found |= self._sound_shards()  # written by other processes of the run
        if len(found) < len(starts):
            raise OSError(f"{self.folder}: shards that were just written are gone or damaged")
        self._shards: list[Any] = [safe_open(found[start], framework="pt") for start in starts]
        self._names: list[str] = list(self._shards[0].keys()) if self._shards else []

    def _sound_shards(self) -> dict[int, Path]:
        """Return the files of the undamaged shards by first row; the others are logged and deleted."""
        sound = {}
        with locked(self.folder):
            shards = [shard for name in sorted(_names_in(self.folder)) if (shard := _SHARD.fullmatch(name))]
            paths = [self.folder / shard[0] for shard in shards]
            hashes = content_hashes(os.path.realpath(self.folder), [os.path.realpath(path) for path in paths])
            for shard, path, value in zip(shards, paths, hashes, strict=True):
                if value is not None and value.hex() == shard[2]:
                    sound[int(shard[1])] = path
                else:
                    log.warning("%s is damaged: its bytes are not those of its name. It is computed again", path)
                    path.unlink(missing_ok=True)
        return sound

    def _build(self, missing: list[int], count: int, compute: Compute) -> dict[int, Path]:
        """Compute the shards that begin at these rows, except those that another process has written meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        built = {}
        stops = {start: min(start + self.rows_per_shard, count) for start in missing}
        rows = sum(stop - start for start, stop in stops.items())
        with progress_bar(rows, f"caching {self.kind}", "row") as bar:
            for start in _from_own_share(missing):
                if any(name.startswith(f"{start:09d}-") for name in _names_in(self.folder)):
                    bar.update(stops[start] - start)  # another process of the run has written it meanwhile
                    continue
                parts = []
                for first in range(start, stops[start], 64):
                    batch = range(first, min(first + 64, stops[start]))
                    parts.append(compute(batch))
                    bar.update(len(batch))
                tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
                with written_aside(self.folder) as aside:
                    save_file(tensors, aside)
                    built[start] = self.folder / f"{start:09d}-{file_hash(aside).hex()}.safetensors"
                    put_in_place(aside, built[start])
        return built

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Return the tensors of one row."""
        shard, offset = divmod(row, self.rows_per_shard)
        file = self._shards[shard]
        return {name: file.get_slice(name)[offset] for name in self._names}

    def column(self, name: str) -> Tensor:
        """Return the tensor `name` of all rows, in memory."""
        return torch.cat([file.get_tensor(name) for file in self._shards])


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _from_own_share(shards: list[int]) -> list[int]:
    """Return all shards, rotated: each process of a run begins at another one, so that they share the work."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = rank * len(shards) // world
    return shards[first:] + shards[:first]


class CachedCaptions(Mapping[str, dict[str, Tensor]]):
    """Outputs of a frozen encoder by caption, cached as `CachedRows`."""

    def __init__(self, captions: Sequence[str], key: str, encode: Callable[[Sequence[str]], dict[str, Tensor]]):
        """Cache the tensors (B, ...) that `encode` returns for B captions; `key` names encoder and captions."""
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._cached = CachedRows("captions", key, len(captions), lambda rows: encode(captions[rows.start : rows.stop]))

    def __getitem__(self, caption: str) -> dict[str, Tensor]:
        """Return the tensors of one caption."""
        return self._cached[self._rows[caption]]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the captions."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self._rows)
