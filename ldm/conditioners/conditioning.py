"""The contract of a conditioner, and several conditioners as one call of the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
View = tuple[int, bool]
"""The number of an image in its data, and whether it is its mirror image."""


@dataclass(frozen=True)
class Conditions:
    """Conditions as a call of the denoiser takes them: input channels and keyword arguments.

    A keyword with a dot is an entry of a dictionary: ``added_cond_kwargs.image_embeds``.
    """

    channels: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def merge(conditions: Sequence[Conditions]) -> Conditions:
    """Return all conditions as one, in their order; raises ValueError if two set the same keyword."""
    refuse_collisions([one.kwargs for one in conditions])
    kwargs = {keyword: value for one in conditions for keyword, value in one.kwargs.items()}
    return Conditions(tuple(channel for one in conditions for channel in one.channels), kwargs)


def refuse_collisions(keywords: Sequence[Collection[str]]) -> None:
    """Raise ValueError if two conditioners, each given by its keywords, set the same one."""
    seen: set[str] = set()
    for one in keywords:
        if both := seen & set(one):
            raise ValueError(f"two conditioners set the denoiser's {min(both)!r}; name other keywords or leave one out")
        seen |= set(one)


def nested(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with the dotted ones gathered: ``a.b`` and ``a.c`` as ``a={"b": ..., "c": ...}``."""
    gathered: dict[str, Any] = {}
    for keyword, value in kwargs.items():
        name, _, entry = keyword.partition(".")
        if entry:
            gathered.setdefault(name, {})[entry] = value
        else:
            gathered[name] = value
    return gathered


def checked_share(where: str, dropout: float) -> float:
    """Return `dropout`; ValueError, which names `where`, unless 0 <= dropout < 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}.dropout: got {dropout}; expected 0 <= dropout < 1")
    return dropout


class ConditioningBatch(Protocol):
    """The part of a batch that conditioners read."""

    @property
    def captions(self) -> Sequence[str]:
        """Return the B captions."""

    @property
    def class_labels(self) -> Tensor | None:
        """Return the B classes, int64; None if the data has none."""

    @property
    def pixel_values(self) -> Tensor | None:
        """Return the images, (B, 3, H, W) in [-1, 1]; None if only their encodings were loaded."""

    @property
    def views(self) -> Sequence[View]:
        """Return the B images by number, and whether each is mirrored."""


class EncodedData(Protocol):
    """The data of a stage, which keeps between runs what frozen networks make of it."""

    def encoded_captions(
        self, key: Callable[[Sequence[str]], str], encode: Callable[[Sequence[str]], Inputs]
    ) -> Mapping[str, Inputs]:
        """Return the outputs for each caption that training and validation may show, and for "".

        key: of these captions, a name for what `encode` makes of them: equal names, equal outputs. encode: returns
        tensors (B, ...) for B captions.
        """

    def encoded_images(self, kind: str, key: str, encode: Callable[[Tensor], Inputs]) -> Mapping[View, Inputs]:
        """Return the outputs for each image, and with ``data.flip`` for its mirror image.

        kind: the name of such outputs in the list of ``ldm cache``. key: a name for what `encode` computes. encode:
        returns tensors (B, ...) for pixel values (B, 3, H, W) in [-1, 1].
        """


class Conditioner(Protocol):
    """A module that turns its part of a batch into conditions."""

    dropout: float
    """Share of samples that train with the null; 0: none, and guidance keeps the condition."""
    frozen: bool
    """True if no network of it is trained in `forward`."""
    reads_pixels: bool
    """True if `inputs` needs the images of the batch."""
    asks: str | None
    """The keyword of a pipeline's call that asks for its condition, as a user names it; None if a user does not."""

    @property
    def given_size(self) -> int | None:
        """Return the pixels, height and width, of the images that a call takes for it; None: any size, or no images."""

    @property
    def keywords(self) -> Collection[str]:
        """Return the denoiser's keyword arguments that it sets."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Return what it encodes with."""

    def inputs(
        self, batch: ConditioningBatch, x0: Tensor, dropped: Sequence[bool], draws: Sequence[torch.Generator]
    ) -> Inputs:
        """Return the tensors that `forward` takes, (B, ...), the null where `dropped`; no gradient.

        x0: what is diffused, (B, ...). draws: a CPU generator for each sample, for all that is random in it.
        """

    def remember(self, data: EncodedData) -> None:
        """Take the output of a frozen network on `data` from the cache from now on; `inputs` computed it until now."""

    def __call__(self, **inputs: Tensor) -> Conditions:
        """Return the conditions; runs inside the trained module's forward."""
