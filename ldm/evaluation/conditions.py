"""The conditions that a pipeline's call can take (a prompt, a class), and how each is read from the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from ldm.config.conditioners import UNKNOWN_CLASS
from ldm.data.batches import Batch, CaptionedImages
from ldm.data.pixels import to_rgb
from ldm.evaluation.baselines import exchanged_captions, other_values


@dataclass(frozen=True)
class Condition:
    """A keyword of a pipeline's call that says what to sample, and what is known of it.

    To support another one, add it to `CONDITIONS`, and its words on a card to `WORDS` of ``ldm.export.pipeline_card``.
    """

    keyword: str
    noun: str
    written_as: str
    """The form in which a user writes it for one image, in words."""
    parsed: Callable[[str], Any]
    """Returns the keyword's value for one image from what a user writes; None if that names no condition."""
    shown: Callable[[str], str]
    """Returns what of that may be written into an image's file."""
    worded: bool
    """True for text: an evaluation then measures how captions are followed, and skips images without one."""
    of: Callable[[CaptionedImages, int], Any]
    """Returns the condition of one image of the data; `nothing` if the image has none."""
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


def _caption(images: CaptionedImages, row: int) -> str:
    return next(iter(images.source.captions(row)), "")


def _class(images: CaptionedImages, row: int) -> int | None:
    label = images.source.class_label(row)
    return None if label == UNKNOWN_CLASS else label


def _classes(batch: Batch) -> list[int | None]:
    if batch.class_labels is None:
        return [None] * len(batch)
    return [None if label == UNKNOWN_CLASS else label for label in batch.class_labels.tolist()]


def _with_classes(batch: Batch, labels: list[int | None]) -> Batch:
    known = [UNKNOWN_CLASS if label is None else label for label in labels]
    return replace(batch, class_labels=torch.tensor(known))


Seen = tuple[int, bool, Tensor | None]
"""An image of a batch: its number, whether it is mirrored, and its pixels, if they were loaded."""


def _images(batch: Batch) -> list[Seen | None]:
    pixels = [None] * len(batch) if batch.pixel_values is None else [*batch.pixel_values]
    return [(*view, one) for view, one in zip(batch.views, pixels, strict=True)]


def _with_images(batch: Batch, seen: list[Any]) -> Batch:
    pixels = None if batch.pixel_values is None else torch.stack([one for _, _, one in seen])
    rows, mirrored = [row for row, _, _ in seen], [turned for _, turned, _ in seen]
    return replace(batch, rows=rows, mirrored=mirrored, pixel_values=pixels)


def _next_ones(values: Sequence[Any]) -> list[Any]:
    if len(values) < 2:
        raise ValueError("one image alone; expected at least two to exchange")
    return [*values[1:], values[0]]


def _opened(path: str) -> list[Image.Image] | None:
    if not Path(path).is_file():
        return None
    with Image.open(path) as image:
        return [to_rgb(image)]


CONDITIONS = {
    condition.keyword: condition
    for condition in (
        Condition(
            keyword="prompt",
            noun="a caption",
            written_as="a text",
            parsed=lambda text: text,
            shown=str,
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
            shown=str,
            worded=False,
            of=_class,
            nothing=None,
            exchange=other_values,
            read=_classes,
            replaced=_with_classes,
            null_class=lambda pipeline: cast("int | None", pipeline.num_classes),
        ),
        Condition(
            keyword="image",
            noun="an image",
            written_as="the path of an image",
            parsed=_opened,
            shown=lambda path: Path(path).name,
            worded=False,
            of=lambda images, row: images.image(row),
            nothing=None,
            exchange=_next_ones,
            read=_images,
            replaced=_with_images,
            null_class=lambda pipeline: None,
        ),
        Condition(
            keyword="batch_size",
            noun="a condition",
            written_as='no prompt but ""',
            parsed=lambda text: None,
            shown=str,
            worded=False,
            of=lambda images, row: None,
            nothing=None,
            exchange=other_values,
            read=lambda batch: [None] * len(batch),
            replaced=lambda batch, conditions: batch,
            null_class=lambda pipeline: None,
        ),
    )
}
"""By keyword, the most specific first. The last one is of unconditional models: it only says how many images."""


def conditions_of(keywords: Iterable[str | None]) -> list[Condition]:
    """Return the conditions of a stage, the most specific first; that of unconditional models if there is no other.

    keywords: what its conditioners ask for, None for one that asks nothing.
    """
    asked = set(keywords)
    found = [condition for keyword, condition in CONDITIONS.items() if keyword in asked]
    return found or [CONDITIONS["batch_size"]]


def condition_by(pipeline: Any) -> Condition:
    """Return the condition that a pipeline's call takes, ours or stock.

    Raises:
        ValueError: the call takes none of `CONDITIONS`, or needs two of them; or the denoiser is conditioned on classes
            and the call takes no class.

    """
    name, parameters = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    takes = set(parameters)
    needed = [one for one in CONDITIONS if one in takes and parameters[one].default is inspect.Parameter.empty]
    if len(needed) > 1:
        raise ValueError(f"{name} needs {' and '.join(needed)} for each image; call it from Python")
    if "image" in takes and parameters["image"].default is not inspect.Parameter.empty:
        takes.discard("image")  # one to start from
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
