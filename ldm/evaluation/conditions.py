"""The conditions that a pipeline can be asked for, and what stands for each in the data."""

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
    """A keyword of a pipeline's call that says what to sample; adding one is one more of these, see `CONDITIONS`."""

    keyword: str
    noun: str
    worded: bool
    """Whether it is text: the questions about captions are asked, and an image without text is not sampled."""
    of: Callable[[Source, int], Any]
    """Returns the condition of an image of a source; `nothing` if it has none."""
    nothing: Any
    """What is asked for where there is no condition."""
    exchange: Callable[[Sequence[Any]], list[Any]]
    """Returns another condition for each of several, of those that occur; ValueError if there is none."""
    read: Callable[[Batch], list[Any]]
    """Returns those of a batch, `nothing` where a sample has none."""
    written: Callable[[Batch, list[Any]], Batch]
    """Returns a batch with others, as `read` gives them."""
    count: Callable[[Any], int | None]
    """Returns how many conditions a pipeline knows, if they are numbered; the next number is its null."""


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
"""By keyword, the one that says most first; the last says only how many images."""


def condition_of(conditioners: Sequence[str | None]) -> Condition:
    """Return the condition of a stage, of whose `conditioners` each names the keyword that asks for it, or None."""
    asked = {keyword for keyword in conditioners if keyword is not None} | {"batch_size"}
    return next(condition for keyword, condition in CONDITIONS.items() if keyword in asked)
