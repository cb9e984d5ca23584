"""The inspection of a data set before a training: unreadable images, duplicates, captions, sizes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ldm.config import DataConfig
from ldm.data.duplicates import Look, groups, look
from ldm.data.hashes import item_digest, lasting_names
from ldm.data.headers import ImageError, decode_pixels, image_errors
from ldm.data.items import Source
from ldm.data.pixels import to_rgb
from ldm.data.preflight import listing, place, quick_problems
from ldm.data.problems import Problem
from ldm.data.profiles import profile_name
from ldm.data.rows import RowSource
from ldm.data.splits import SPLITS, split_images
from ldm.terminal import progress_bar

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""From captions to their numbers of tokens, begin and end included."""
EXAMPLES = 12
NAMED = 3
"""Images of a group and split that the problem's reason names; `Inspection.near_duplicates` has all."""


@dataclass(frozen=True)
class Facts:
    """Properties of a decoded image; `size` is its upright width and height in pixels."""

    row: int
    size: tuple[int, int]
    mode: str
    format: str
    profile: str
    digest: bytes
    look: Look


@dataclass(frozen=True)
class Inspection:
    """Problems and statistics of a data set; `statistics` can be written as JSON."""

    problems: list[Problem]
    statistics: dict[str, Any]
    examples: list[int]
    """Some rows without problems."""
    near_duplicates: list[dict[str, list[str]]]
    """Groups of images that look alike, largest first: by split, the path or name of each image."""

    @property
    def stops(self) -> bool:
        """True if a training would refuse the data."""
        return any(problem.stops for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Return everything for a JSON file: statistics, problems by kind, and groups of near duplicates."""
        kinds: dict[str, list[dict[str, str]]] = defaultdict(list)
        for problem in self.problems:
            kinds[problem.kind].append({"where": problem.where, "reason": problem.reason})
        found = {"problems": kinds, "near duplicates": self.near_duplicates}
        return {"trainable": not self.stops, **self.statistics, **found}

    def text(self) -> str:
        """Return a summary to print: the statistics line by line, and the first problems of each kind."""
        lines = [f"{name}: {_shown(value)}" for name, value in self.statistics.items()]
        stopping, others = ([p for p in self.problems if p.stops is stops] for stops in (True, False))
        if others:
            lines.append(f"{len(others)} problem(s) worth knowing:\n{listing(others)}")
        if stopping:
            lines.append(f"{len(stopping)} problem(s) that stop a training:\n{listing(stopping)}")
        return "\n".join([*lines, "a training would stop" if stopping else "nothing here stops a training"])


def inspect(
    source: Source, config: DataConfig, count_tokens: CountTokens, max_length: int, workers: int = 0
) -> Inspection:
    """Return the problems and statistics of a source's images and captions.

    Images are decoded in `workers` processes (0: in this one); memory grows by about 10 KB an image. `max_length` is
    the number of tokens that a caption may have.

    Raises:
        ValueError: there are no rows, and no problem that explains it.

    """
    if not len(source) and not source.problems:
        raise ValueError("the data has no rows")
    problems = list(quick_problems(source, config))
    unread = {problem.row for problem in problems if problem.stops and problem.kind != "bad caption"}
    facts: list[Facts] = []
    for seen in _decoded(source, config, [row for row in range(len(source)) if row not in unread], workers):
        if isinstance(seen, Facts):
            facts.append(seen)
        else:
            problems.append(seen)
    owner, unsplit = _splits(source, config, facts, problems)
    alike = [group for group in _look_alikes(facts, owner) if not _of_one_origin(source, group)]
    problems += [*unsplit, *_exact_duplicates(source, facts), *(_near_duplicate(source, group) for group in alike)]
    bad = {problem.row for problem in problems if problem.stops}
    good = [fact for fact in facts if fact.row not in bad]
    statistics = {
        "rows": len(source),
        "good rows": len(good),
        **_columns(source),
        "problem kinds": dict(Counter(problem.kind for problem in problems).most_common()),
        "splits": {name: list(owner.values()).count(name) for name in SPLITS},
        **_image_statistics(good, config.image_size),
        "captions": _caption_statistics([source.captions(fact.row) for fact in good], count_tokens, max_length),
    }
    examples = [fact.row for fact in sorted(good, key=lambda fact: fact.digest)[:EXAMPLES]]
    near_duplicates = [
        {split: [place(source, row) for row in rows] for split, rows in group.items()} for group in alike
    ]
    return Inspection(problems, statistics, examples, near_duplicates)


def _shown(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items()) or "none"


class _Decoding(Dataset[Facts | Problem]):
    """The facts of each row, or its problem; worker processes read it."""

    def __init__(self, source: Source, background: str, rows: Sequence[int]):
        self.source, self.background, self.rows = source, background, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Facts | Problem:
        row, source = self.rows[index], self.source
        where = place(source, row)
        try:
            with image_errors():
                frames = [source.header(row)] if isinstance(source, RowSource) else source.item(row)
                image = frames[len(frames) // 2]
                mode, kind = image.mode, image.format or "none"
                profile = profile_name(image.info.get("icc_profile"), mode)
                rgb = [to_rgb(decode_pixels(frame), self.background) for frame in frames]
                middle = rgb[len(rgb) // 2]
                return Facts(row, middle.size, mode, kind, profile, item_digest(rgb), look(middle))
        except ImageError as error:
            return Problem(where, error.kind, str(error), row)
        except OSError as error:
            return Problem(where, "unreadable", error.strerror or str(error), row)


def _decoded(source: Source, config: DataConfig, rows: Sequence[int], workers: int) -> Iterator[Facts | Problem]:
    dataset = _Decoding(source, config.background, rows)
    loader = DataLoader(dataset, batch_size=64, num_workers=workers, collate_fn=list)
    with progress_bar(len(rows), "decoding", "image") as bar:
        for several in loader:
            yield from several
            bar.update(len(several))


def _splits(
    source: Source, config: DataConfig, facts: Sequence[Facts], problems: Sequence[Problem]
) -> tuple[dict[int, str], list[Problem]]:
    """Return the split of each row that can be trained on, and the problem if the data cannot be split."""
    bad = {problem.row for problem in problems if problem.stops}
    rows = [fact.row for fact in facts if fact.row not in bad]
    if not rows:
        return {}, []
    names = None if source.names is None else [source.names[row] for row in rows]
    hashes = lasting_names([fact.digest.hex() for fact in facts if fact.row not in bad], names)
    captions, percent = (lambda index: source.all_captions(rows[index])), config.held_out_percent
    owner: dict[int, str] = {}
    try:
        origins = None if source.origins is None else [source.origins[row] for row in rows]
        splits = split_images(hashes, captions, config.held_out, percent, config.limit, origins)
        owner = {rows[index]: name for name, members in splits.indices.items() for index in members}
        splits.filled("validation")
    except (ValueError, OSError) as error:
        return owner, [Problem("data.held_out", "bad split", str(error))]
    return owner, []


def _exact_duplicates(source: Source, facts: Sequence[Facts]) -> Iterator[Problem]:
    """Yield a problem for each image with the pixels of an earlier one; the two always share a split."""
    first: dict[bytes, int] = {}
    for fact in facts:
        earlier = first.setdefault(fact.digest, fact.row)
        if earlier != fact.row:
            reason = f"the same pixels as {place(source, earlier)}"
            yield Problem(place(source, fact.row), "exact duplicate", reason, fact.row, (earlier,))


def _look_alikes(facts: Sequence[Facts], owner: dict[int, str]) -> list[dict[str, list[int]]]:
    """Return the groups of images that look alike, largest first, as rows by split; one row for exact duplicates."""
    first: dict[bytes, Facts] = {}
    for fact in facts:
        first.setdefault(fact.digest, fact)
    distinct = list(first.values())
    found = []
    for group in groups([fact.look for fact in distinct]):
        by_split: dict[str, list[int]] = defaultdict(list)
        for index in group:
            by_split[owner.get(distinct[index].row, "no split")].append(distinct[index].row)
        found.append({split: by_split[split] for split in (*SPLITS, "no split") if split in by_split})
    return found


def _of_one_origin(source: Source, group: dict[str, list[int]]) -> bool:
    """Return whether all of a group were made of one image: that clips of it look alike is known."""
    return source.origins is not None and len({source.origins[row] for rows in group.values() for row in rows}) == 1


def _near_duplicate(source: Source, group: dict[str, list[int]]) -> Problem:
    """Return the problem of a group of images that look alike; its rows alternate between the splits."""
    kind = "near duplicate" if len(group) == 1 else "near duplicate across splits"
    counts = ", ".join(f"{len(rows)} in {split}" for split, rows in group.items())
    flattered = "; this flatters what is measured" if len(group) > 1 else ""
    names = "; ".join(f"{split}: {_names(source, rows)}" for split, rows in group.items())
    rows = [row for several in zip_longest(*group.values()) for row in several if row is not None]
    reason = f"{len(rows)} images look alike ({counts}{flattered}): {names}"
    return Problem(place(source, rows[0]), kind, reason, rows[0], tuple(rows[1:]))


def _names(source: Source, rows: Sequence[int]) -> str:
    names = ", ".join(place(source, row) for row in rows[:NAMED])
    return names if len(rows) <= NAMED else f"{names} and {len(rows) - NAMED} more"


def _columns(source: Source) -> dict[str, Any]:
    """Return the names of the columns of images and captions."""
    if not isinstance(source, RowSource):
        return {}
    return {"columns": {"images": source.rows.image_column, "captions": source.rows.caption_column or "none"}}


def _image_statistics(facts: Sequence[Facts], image_size: int) -> dict[str, Any]:
    """Return statistics of sizes, modes and formats; `aspect` is width over height."""
    if not facts:
        return {}
    widths, heights = ([fact.size[side] for fact in facts] for side in (0, 1))
    small = sum(min(fact.size) < image_size for fact in facts)
    return {
        "width": _spread(widths),
        "height": _spread(heights),
        "aspect": _spread([width / height for width, height in zip(widths, heights, strict=True)]),
        f"share smaller than {image_size} px": round(small / len(facts), 4),
        "modes": dict(Counter(fact.mode for fact in facts).most_common()),
        "formats": dict(Counter(fact.format for fact in facts).most_common()),
        "colour profiles": dict(Counter(fact.profile for fact in facts).most_common()),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": round(min(values), 3), "median": round(median(values), 3), "max": round(max(values), 3)}


def _caption_statistics(
    captions: Sequence[Sequence[str]], count_tokens: CountTokens, max_length: int
) -> dict[str, Any]:
    """Return the number of captions, the ones that several images share, and the share of tokens that is cut off."""
    images = Counter(caption for several in captions for caption in set(several))
    everything = [caption for several in captions for caption in several]
    repeated = [(caption, count) for caption, count in images.most_common() if count > 1]
    statistics: dict[str, Any] = {
        "captions": len(everything),
        "images without": sum(not several for several in captions),
        "at several images": len(repeated),
        "most repeated": dict(repeated[:EXAMPLES]),
        "longest, characters": max(map(len, everything), default=0),
    }
    if not everything:
        return statistics
    tokens = count_tokens(everything)
    cut = [max(0, count - max_length) for count in tokens]
    return statistics | {
        "max_length, tokens": max_length,
        "longest, tokens": max(tokens),
        "share of captions cut": round(sum(map(bool, cut)) / len(tokens), 4),
        "share of tokens cut": round(sum(cut) / sum(tokens), 4),
    }
