"""The split into train, validation and test: by image, never by caption."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ldm.errors import ConfigError
from ldm.files import read_lines

log = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """Indices of each split, and a hash of the held-out images, which is recorded with the model."""

    indices: Mapping[str, tuple[int, ...]]
    held_out_hash: str

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """Return the indices of split `name`, in the source's order."""
        return self.indices[name]

    def filled(self, name: str) -> tuple[int, ...]:
        """Return the indices of split `name`; ConfigError if it is empty, since a training needs it."""
        if not self[name]:
            count = sum(map(len, self.indices.values()))
            raise ConfigError(
                f"the {name} split has no images, of {count} in all; a training needs two or more that differ, one of "
                "them for validation: set data.held_out_percent above 0, or name captions in data.held_out; data.limit "
                "may be too small"
            )
        return self[name]


def split_images(
    hashes: Sequence[str],
    all_captions: Callable[[int], Sequence[str]],
    held_out: Mapping[str, str],
    held_out_percent: float,
    limit: int | None = None,
    origins: Sequence[str] | None = None,
) -> Splits:
    """Return the splits of items with these pixel `hashes`; items of equal pixels always share a split.

    `held_out` maps "validation" and "test" to files of captions, one a line. Every image with such a caption, in any
    language, goes to that split, and every image with equal pixels too. Without it, `held_out_percent` of the images
    go to each of the two by their hash, so that a growing data set never moves an image. Then items of one of the
    `origins` (`Source.origins`) share a split too: the hash of the origin's name decides.

    If this leaves no image for validation and two or more for training, one training image is moved to validation and
    this is logged: the one nearest to validation by its hash. When the set grows, it may go back to training, and
    `held_out_hash` changes. No image ever moves from training to validation when the set grows.

    With a `limit`, that many images are kept, the first ones by another hash, which favours no split.
    """
    unknown = sorted(set(held_out) - {"validation", "test"})
    if unknown:
        raise ConfigError(f"data.held_out: no split {unknown[0]!r}; name 'validation' and 'test'")
    kept = _kept(hashes, limit)
    if held_out:
        owner = _by_caption(hashes, all_captions, held_out)
    else:
        decides = dict(zip(hashes, hashes, strict=True)) if origins is None else _joined(hashes, origins)
        owner = {value: _by_hash(one, held_out_percent) for value, one in decides.items()}
        if held_out_percent > 0:
            _hold_one_out(owner, {hashes[index]: decides[hashes[index]] for index in kept}, held_out_percent)
    members: dict[str, list[int]] = {name: [] for name in SPLITS}
    for index in kept:
        members[owner.get(hashes[index], "train")].append(index)
    if not members["train"]:
        raise ConfigError("every image is held out; nothing is left to train on")
    held = sorted(value for value in set(hashes) if owner.get(value, "train") != "train")
    digest = blake2b("\n".join(held).encode(), digest_size=16).hexdigest()
    return Splits({name: tuple(rows) for name, rows in members.items()}, digest)


def _joined(hashes: Sequence[str], origins: Sequence[str]) -> dict[str, str]:
    """Return the origin that decides for each hash; origins with equal items are one, named by the smallest of them."""
    leads = {origin: origin for origin in origins}

    def lead(origin: str) -> str:
        while leads[origin] != origin:
            leads[origin] = leads[leads[origin]]
            origin = leads[origin]
        return origin

    first: dict[str, str] = {}
    for value, origin in zip(hashes, origins, strict=True):
        smaller, larger = sorted((lead(origin), lead(first.setdefault(value, origin))))
        leads[larger] = smaller
    return {value: lead(origin) for value, origin in first.items()}


def _kept(hashes: Sequence[str], limit: int | None) -> Sequence[int]:
    """Return the indices of the first `limit` images by a hash of their hashes, ascending; None: all indices."""
    if limit is None:
        return range(len(hashes))
    return sorted(sorted(range(len(hashes)), key=lambda index: _place(hashes[index], b"limit"))[:limit])


def _hold_one_out(owner: dict[str, str], kept: Mapping[str, str], percent: float) -> None:
    """Move one of the `kept` images to validation if it has none and training has two or more, in place.

    kept: the origin of each image, or the image itself; those of one origin move together.
    """
    train = {kept[value] for value in kept if owner[value] == "train"}
    if len(train) < 2 or any(owner[value] == "validation" for value in kept):
        return
    moved = min(train, key=_place)
    owner |= {value: "validation" for value in kept if kept[value] == moved}
    log.warning(
        "data.held_out_percent %g of %d images leaves none for validation: one is taken from training, and may go back "
        "when the set grows; to hold images out for good, raise it, or name captions in data.held_out",
        percent, len(kept),
    )  # fmt: skip


def _listed(split: str, path: str) -> list[str]:
    try:
        return read_lines(path)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data.held_out.{split}: {error}") from None


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
        raise ConfigError(
            f"data.held_out: {len(missing)} of {len(wanted)} captions belong to no image, such as {missing[0]!r}"
        )
    return owner


def _by_hash(value: str, percent: float) -> str:
    place = 100 * _place(value)
    if place < percent:
        return "validation"
    return "test" if place < 2 * percent else "train"


def _place(value: str, use: bytes = b"") -> float:
    """Return a pseudo-random number in [0, 1) for an image's hash, another one for each `use`."""
    return int(blake2b(value.encode(), digest_size=8, person=use).hexdigest(), 16) / 2**64
