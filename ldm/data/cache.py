"""Rows of tensors that cost something to compute, kept on disk between runs and shared by them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

ROWS_PER_SHARD = 1024
Compute = Callable[[range], dict[str, Tensor]]


def cache_folder() -> Path:
    """Return the folder of everything that can be computed again: ``$LDM_CACHE``, else ``~/.cache/ldm``."""
    chosen = os.environ.get("LDM_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "ldm"


class CachedRows:
    """``count`` rows of named tensors in safetensors shards, memory-mapped: memory stays flat as the set grows.

    `key` must name everything the rows depend on (data, transform, network). Shards that are missing are computed,
    one after another, so that an interrupted build goes on where it stopped.
    """

    def __init__(self, kind: str, key: str, count: int, compute: Compute, rows_per_shard: int = ROWS_PER_SHARD):
        digest = blake2b(f"{key}/{count}/{rows_per_shard}".encode(), digest_size=12).hexdigest()
        self.folder = cache_folder() / kind / digest
        self.rows_per_shard = rows_per_shard
        starts = range(0, count, rows_per_shard)
        self._paths = [self.folder / f"{start:09d}.safetensors" for start in starts]
        missing = [(start, path) for start, path in zip(starts, self._paths, strict=True) if not path.exists()]
        if missing:
            self._build(kind, missing, count, compute)
        self._shards: list[Any] = [safe_open(path, framework="pt") for path in self._paths]
        self._names: list[str] = list(self._shards[0].keys())

    def _build(self, kind: str, missing: list[tuple[int, Path]], count: int, compute: Compute) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = sum(min(self.rows_per_shard, count - start) for start, _ in missing)
        with tqdm(total=rows, desc=f"caching {kind}", unit="row", mininterval=1) as bar:
            for start, path in _from_own_share(missing):
                if path.exists():  # by now, from another process of the run
                    bar.update(min(self.rows_per_shard, count - start))
                    continue
                stop = min(start + self.rows_per_shard, count)
                parts = []
                for first in range(start, stop, 64):
                    batch = range(first, min(first + 64, stop))
                    parts.append(compute(batch))
                    bar.update(len(batch))
                tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
                aside = path.with_suffix(f".{os.getpid()}.tmp")  # a killed build leaves no half shard
                save_file(tensors, aside)
                aside.replace(path)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Return the tensors of one row."""
        shard, offset = divmod(row, self.rows_per_shard)
        file = self._shards[shard]
        return {name: file.get_slice(name)[offset] for name in self._names}


def _from_own_share(shards: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """Return all shards, beginning where this process of a run with several begins: so that they share the work."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = rank * len(shards) // world
    return shards[first:] + shards[:first]


class CachedCaptions(Mapping[str, dict[str, Tensor]]):
    """What a frozen encoder makes of captions, by caption, kept as `CachedRows`."""

    def __init__(self, captions: Sequence[str], key: str, encode: Callable[[Sequence[str]], dict[str, Tensor]]):
        """`encode` returns tensors (B, ...) for B captions; `key` names what it makes of these captions."""
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
