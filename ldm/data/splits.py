"""Train, validation and test: by picture, never by caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """Indices of each split, and a hash of what was held out for components to record."""

    indices: Mapping[str, tuple[int, ...]]
    held_out_hash: str

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """Return the indices of split `name`, in the source's order."""
        return self.indices[name]


def split_pictures(
    hashes: Sequence[str],
    all_captions: Callable[[int], Sequence[str]],
    held_out: Mapping[str, str],
    held_out_percent: float,
) -> Splits:
    """Return the splits of pictures with these pixel `hashes`; pictures of equal pixels always share a split.

    `held_out` maps "validation" and "test" to files of captions, a line each: every picture that has one of them, in
    any language, and every picture equal to such a one, goes there. Without it, `held_out_percent` of the pictures
    go to each of the two by their hash, so that a growing data set never moves a picture.
    """
    unknown = sorted(set(held_out) - {"validation", "test"})
    if unknown:
        raise ValueError(f"data.held_out: no split {unknown[0]!r}; name 'validation' and 'test'")
    if held_out:
        owner = _by_caption(hashes, all_captions, held_out)
    else:
        owner = {value: _by_hash(value, held_out_percent) for value in set(hashes)}
    members: dict[str, list[int]] = {name: [] for name in SPLITS}
    for index, value in enumerate(hashes):
        members[owner.get(value, "train")].append(index)
    if not members["train"]:
        raise ValueError("every picture is held out; nothing is left to train on")
    held = sorted(value for value in set(hashes) if owner.get(value, "train") != "train")
    digest = blake2b("\n".join(held).encode(), digest_size=16).hexdigest()
    return Splits({name: tuple(rows) for name, rows in members.items()}, digest)


def read_captions(path: str | Path) -> list[str]:
    """Return the captions in a file, a line each, empty lines left out; ValueError if it is not UTF-8."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file of captions at {file}; paths are relative to where the command is run")
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not text in UTF-8 at byte {error.start}") from None


def _listed(split: str, path: str) -> list[str]:
    try:
        return read_captions(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"data.held_out.{split}: {error}") from None


def _by_caption(
    hashes: Sequence[str], all_captions: Callable[[int], Sequence[str]], held_out: Mapping[str, str]
) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for name in ("validation", "test"):  # a caption in both files is a test caption
        wanted |= dict.fromkeys(_listed(name, held_out[name]) if name in held_out else [], name)
    owner: dict[str, str] = {}
    found: set[str] = set()
    for index, value in enumerate(hashes):
        for caption in all_captions(index):
            if caption in wanted and owner.get(value) != "test":
                owner[value] = wanted[caption]
            found |= {caption} & wanted.keys()
    if missing := sorted(wanted.keys() - found):
        raise ValueError(
            f"data.held_out: {len(missing)} of {len(wanted)} captions belong to no picture, such as {missing[0]!r}"
        )
    return owner


def _by_hash(value: str, percent: float) -> str:
    place = int(blake2b(value.encode(), digest_size=8).hexdigest(), 16) / 2**64 * 100
    if place < percent:
        return "validation"
    return "test" if place < 2 * percent else "train"
