"""The check of the data before the first step: quick checks first, then every image is decoded."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from ldm.config import DataConfig
from ldm.data.hashes import pixel_hashes
from ldm.data.headers import ImageError, decode_pixels, image_errors, metadata_fault
from ldm.data.items import Source, Subset
from ldm.data.pixels import to_rgb
from ldm.data.problems import Problem, caption_fault, label_fault
from ldm.data.rows import RowSource, texts
from ldm.data.sources import OWN, build_source
from ldm.errors import ConfigError

log = logging.getLogger(__name__)

LISTED = 20
"""Most problems of one kind that a message lists one by one."""
WARNINGS = {
    "unlisted": "%d images of the folder are in no row, such as %s",
    "in no split": "%d rows are of images in no split and left out, such as %s",
    "ignored metadata": "%d images have metadata that cannot be read and is ignored, such as %s",
}
"""Warnings of a training about problems that do not stop it: their number and one example."""


def checked_source(config: DataConfig) -> Source:
    """Return the images that `config` names, without those that cannot be trained on.

    Metadata, paths, headers and captions are checked. Then every image is decoded: the split needs its hash anyway,
    and the hash is cached. Images that we render ourselves (openmoji, openmoji_clips) are not checked. Of films, those
    with a problem have no clips, and the clips of the others are decoded.

    Raises:
        ValueError: a row cannot be trained on and `data.on_bad_data` is "error", or no row can be.

    """
    began = time.perf_counter()
    source = build_source(config)
    if config.source in OWN:
        return source
    found = list(quick_problems(source, config))
    log.info("looked at %d images and captions in %.1f s", len(source), time.perf_counter() - began)
    for kind, words in WARNINGS.items():
        if of := [problem for problem in found if problem.kind == kind]:
            log.warning(words, len(of), of[0].where)
    stopping = [problem for problem in found if problem.stops]
    good = _good_rows(source, stopping, config)
    hashes = pixel_hashes(Subset(source, good) if len(good) < len(source) else source, config.background)
    undecodable = [row for row, value in zip(good, hashes, strict=True) if value is None]
    if undecodable:
        stopping += [undecodable_problem(source, row, config.background) for row in undecodable]
        good = _good_rows(source, stopping, config)
    if stopping:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(problem.kind for problem in stopping).items())
        epoch = f"{len(good) / config.batch_size:.1f} steps of {config.batch_size}"
        unread = sum(problem.row is None for problem in stopping)
        log.warning(
            "data.on_bad_data skip: %d rows left out (%s); the other %d make an epoch of %s, less what is held out",
            len(source) - len(good) + unread, kinds, len(good), epoch,
        )  # fmt: skip
    return Subset(source, good) if len(good) < len(source) else source


def quick_problems(source: Source, config: DataConfig) -> Iterator[Problem]:
    """Yield the problems of metadata, paths, headers, captions and classes; no image is decoded."""
    yield from source.problems
    if not isinstance(source, RowSource):
        return
    for row, caption in enumerate(source.rows.caption_values()):
        where = source.where(row)
        try:
            with source.header(row) as image:
                if ignored := metadata_fault(image):
                    yield Problem(where, "ignored metadata", ignored, row)
        except ImageError as error:
            yield Problem(where, error.kind, str(error), row)
        except OSError as error:
            yield Problem(where, "unreadable", error.strerror or str(error), row)
        if reason := caption_fault(caption):
            yield Problem(where, "bad caption", reason, row)
        elif not texts(caption):
            yield Problem(where, "no caption", "it will be trained unconditionally", row)
        if config.class_column is not None and (reason := label_fault(source.rows.label_value(row))):
            yield Problem(where, "bad class", reason, row)


def undecodable_problem(source: Source, row: int, background: str) -> Problem:
    """Return the problem of a row whose image, or clip, cannot be decoded."""
    try:
        with image_errors():
            for frame in [source.header(row)] if isinstance(source, RowSource) else source.item(row):
                to_rgb(decode_pixels(frame), background)
        reason = "it cannot be decoded"
    except (ImageError, OSError) as error:
        reason = str(error)
    return Problem(place(source, row), "unreadable", reason, row)


def place(source: Source, row: int) -> str:
    """Return a row's name for people: the path of its image in the folder, the image's name, or the row's number."""
    if (where := getattr(source, "where", None)) is not None:
        return str(where(row))
    return f"row {row}" if source.names is None else source.names[row]


def listing(problems: Sequence[Problem]) -> str:
    """Return the first problems of each kind, a line each, and the number of the others."""
    lines = []
    for kind, count in Counter(problem.kind for problem in problems).items():
        lines += [f"  {problem}" for problem in problems if problem.kind == kind][:LISTED]
        if count > LISTED:
            lines.append(f"  {kind}: and {count - LISTED} more, {count} in all")
    return "\n".join(lines)


def _good_rows(source: Source, stopping: Sequence[Problem], config: DataConfig) -> list[int]:
    """Return the rows without a problem; ConfigError if there is none, or if problems are errors by the config."""
    if stopping and config.on_bad_data == "error":
        raise ConfigError(
            f"{len(stopping)} problem(s) in data.path {config.path}, which has {len(source)} rows:\n"
            f"{listing(stopping)}\nCorrect them, or leave them out with data.on_bad_data: skip; ldm validate finds more"
        )
    bad = {problem.row for problem in stopping}
    good = [row for row in range(len(source)) if row not in bad]
    if not good:
        raise ConfigError(f"data.path {config.path}: not one row can be trained on:\n{listing(stopping)}")
    return good
