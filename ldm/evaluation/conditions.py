"""The conditions that a pipeline's call can take (a prompt, a class), and how each is read from the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ldm.config.conditioners import UNKNOWN_CLASS
from ldm.data.batches import Batch
from ldm.data.sources import Source
from ldm.evaluation.baselines import exchanged_captions, other_values


@dataclass(frozen=True)
class Condition:
    """A keyword of a pipeline's call that says what to sample, and what is known of it.

    To support another one, add it to `CONDITIONS`, and its words on a card to `ASKED` of ``ldm.export.pipeline_card``.
    """

    keyword: str
    noun: str
    written_as: str
    """What a user writes for one image, in words."""
    parsed: Callable[[str], Any]
    """Returns the keyword's value for one image from what a user writes; None if that names no condition."""
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
    replaced: Callable[[Batch, list[Any]], Batch]
    """Returns the batch with other conditions, in the form that `read` returns."""
    null_class: Callable[[Any], int | None]
    """Returns the class that stands for no condition in a pipeline's denoiser; None if the condition is no class."""


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
            written_as="a text",
            parsed=lambda text: text,
            worded=True,
            of=_caption,
            nothing="",
            exchange=exchanged_captions,
            read=lambda batch: list(batch.captions),
            replaced=lambda batch, captions: replace(batch, captions=captions),
            null_class=lambda pipeline: None,
        ),
        Condition(
            keyword="class_labels",
            noun="a class",
            written_as="the number of a class",
            parsed=lambda text: [int(text)] if text.isdecimal() else None,
            worded=False,
            of=_class,
            nothing=None,
            exchange=other_values,
            read=_classes,
            replaced=_with_classes,
            null_class=lambda pipeline: cast("int | None", pipeline.num_classes),
        ),
        Condition(
            keyword="batch_size",
            noun="a condition",
            written_as='no prompt but ""',
            parsed=lambda text: None,
            worded=False,
            of=lambda source, row: None,
            nothing=None,
            exchange=other_values,
            read=lambda batch: [None] * len(batch),
            replaced=lambda batch, conditions: batch,
            null_class=lambda pipeline: None,
        ),
    )
}
"""By keyword, the most specific first. The last one is of unconditional models: it only says how many images."""


def condition_of(keywords: Iterable[str | None]) -> Condition:
    """Return the condition of a stage; `keywords` are what its conditioners ask for, None for one that asks nothing."""
    asked = {*keywords, "batch_size"}
    return next(condition for keyword, condition in CONDITIONS.items() if keyword in asked)


def condition_by(pipeline: Any) -> Condition:
    """Return the condition that a pipeline's call takes, ours or stock.

    Raises:
        ValueError: the call takes none of `CONDITIONS`; or the denoiser is conditioned on classes and the call takes no
            class.

    """
    name, takes = type(pipeline).__name__, set(inspect.signature(pipeline.__call__).parameters)
    unet = pipeline.components.get("unet")
    classes = unet is None or unet.config.get("num_class_embeds") is not None
    if not classes:
        takes.discard("class_labels")
    found = next((condition for keyword, condition in CONDITIONS.items() if keyword in takes), None)
    if found is None:
        raise ValueError(f"{name} takes none of {', '.join(CONDITIONS)}; expected a pipeline that does")
    if found.keyword == "batch_size" and unet is not None and classes:
        raise ValueError(
            f"{name} passes no classes to its denoiser: load the folder's own pipeline, --trust_remote_code true"
        )
    return found
