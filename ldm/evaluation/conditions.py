"""The conditions that a pipeline's call can take (a prompt, a class), and how each is read from the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ldm.config.conditioners import UNKNOWN_CLASS
from ldm.data.batches import Batch
from ldm.data.sources import Source
from ldm.evaluation.baselines import exchanged_captions, other_values


@dataclass(frozen=True)
class Condition:
    """A keyword of a pipeline's call that says what to sample. To support another one, add it to `CONDITIONS`."""

    keyword: str
    noun: str
    worded: bool
    """True for text: an evaluation then measures how captions are followed, and skips images without one."""
    of: Callable[[Source, int], Any]
    """Returns the condition of one image of a source; `nothing` if the image has none."""
    nothing: Any
    """The value that stands for no condition."""
    exchange: Callable[[Sequence[Any]], list[Any]]
    """Returns for each of several conditions a different one of them; ValueError if there is none."""
    read: Callable[[Batch], list[Any]]
    """Returns the conditions of a batch, `nothing` where a sample has none."""
    written: Callable[[Batch, list[Any]], Batch]
    """Returns the batch with other conditions, in the form that `read` returns."""
    count: Callable[[Any], int | None]
    """Returns the number of classes of a pipeline, which is also its null class; None if it has no classes."""


def _caption(source: Source, row: int) -> str:
    return next(iter(source.captions(row)), "")


def _class(source: Source, row: int) -> int | None:
    label = source.class_label(row)
    return None if label == UNKNOWN_CLASS else label


def _classes(batch: Batch) -> list[int | None]:
    if batch.class_labels is None:
        return [None] * len(batch)
    return [None if label == UNKNOWN_CLASS else label for label in batch.class_labels.tolist()]


def _with_classes(batch: Batch, labels: list[int | None]) -> Batch:
    known = [UNKNOWN_CLASS if label is None else label for label in labels]
    return replace(batch, class_labels=torch.tensor(known))


CONDITIONS = {
    condition.keyword: condition
    for condition in (
        Condition(
            keyword="prompt",
            noun="a caption",
            worded=True,
            of=_caption,
            nothing="",
            exchange=exchanged_captions,
            read=lambda batch: list(batch.captions),
            written=lambda batch, captions: replace(batch, captions=captions),
            count=lambda pipeline: None,
        ),
        Condition(
            keyword="class_labels",
            noun="a class",
            worded=False,
            of=_class,
            nothing=None,
            exchange=other_values,
            read=_classes,
            written=_with_classes,
            count=lambda pipeline: cast("int | None", pipeline.num_classes),
        ),
        Condition(
            keyword="batch_size",
            noun="a condition",
            worded=False,
            of=lambda source, row: None,
            nothing=None,
            exchange=other_values,
            read=lambda batch: [None] * len(batch),
            written=lambda batch, conditions: batch,
            count=lambda pipeline: None,
        ),
    )
}
"""By keyword, the most specific first. The last one is of unconditional models: it only says how many images."""


def condition_of(conditioners: Sequence[str | None]) -> Condition:
    """Return the condition of a stage; `conditioners` are the keywords of its conditioners, None for one without."""
    asked = {keyword for keyword in conditioners if keyword is not None} | {"batch_size"}
    return next(condition for keyword, condition in CONDITIONS.items() if keyword in asked)
