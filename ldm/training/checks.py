"""Measures of what most often keeps a model from learning: scale of the latents, the null, captions, use of the text.

They change nothing; what follows from them is said elsewhere: see `ldm.training.alarms`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data.batches import Batch
from ldm.training.steps import DiffusionStep

COUNTED_CAPTIONS = 10_000
"""Captions that `truncation` reads at most."""


@dataclass(frozen=True)
class Scale:
    """Mean and std of all elements of what is diffused."""

    mean: float
    std: float

    @property
    def unit(self) -> bool:
        """Return whether noise of std 1 fits it: std in [0.5, 2], mean in [-0.5, 0.5]."""
        return 0.5 <= self.std <= 2 and abs(self.mean) <= 0.5


def latent_scale(x0: Tensor) -> Scale:
    """Return the scale of x0, (B, ...), as `DiffusionStep.x0` gives it."""
    return Scale(float(x0.float().mean()), float(x0.float().std()))


@dataclass(frozen=True)
class Truncation:
    """Shares, in [0, 1], of the captions that the tokenizer cuts, and of all tokens that it cuts off."""

    captions: float
    tokens: float


def truncation(tokenizer: Any, captions: Sequence[str]) -> Truncation:
    """Return the shares of `captions` that a tokenizer cuts at its ``model_max_length``, begin and end included.

    It reads at most `COUNTED_CAPTIONS` of them, evenly spread. Without captions or a tokenizer the shares are 0.
    """
    some = list(captions[:: 1 + len(captions) // COUNTED_CAPTIONS])
    if not some or tokenizer is None:
        return Truncation(0.0, 0.0)
    tokens = [len(ids) for ids in tokenizer(some, verbose=False)["input_ids"]]
    cut = [max(0, count - tokenizer.model_max_length) for count in tokens]
    return Truncation(sum(map(bool, cut)) / len(some), sum(cut) / sum(tokens))


@torch.no_grad()
def null_difference(step: DiffusionStep, batch: Batch, pipeline: Any) -> float | None:
    """Return how far apart training's null and the pipeline's are: the rms of what differs over the pipeline's rms.

    Training's null is the conditioning of dropped captions of `batch`, the pipeline's what `encode_prompt` makes of no
    negative prompt. 0 but for rounding if guidance steers from where training has been, infinite if
    their shapes differ; None if training drops no caption (``conditioners.text.dropout: 0``), or has none.
    """
    if step.asked is None or not step.condition.worded:
        return None
    conditioner = step.averaged.conditioner(step.asked)
    if not conditioner.dropout:
        return None
    inputs = step.inputs(batch, step.x0(batch), dropped=True)
    kwargs = conditioner(**inputs[step.asked]).kwargs
    trained = kwargs["encoder_hidden_states"].float()
    if (mask := kwargs.get("encoder_attention_mask")) is not None:  # the pipeline writes zeros where nobody looks
        trained = trained * mask[..., None].to(trained)
    _, sampled = pipeline.encode_prompt("", step.run.device)
    if trained.shape[1:] != sampled.shape[1:]:
        return math.inf
    difference = trained - sampled.to(trained)
    return float(difference.square().mean().sqrt() / sampled.float().square().mean().sqrt().clamp(min=1e-12))


@dataclass(frozen=True)
class Gain:
    """Loss with exchanged captions minus loss with the right ones, same noise: 0 if the model does not use the text."""

    by_level: list[float]
    """Mean over the samples, at each noise level."""
    mean: float
    """Mean of those."""
    standard_error: float
    """Standard error of `mean`, from the spread over the samples."""


def conditional_gain(
    step: DiffusionStep, batch: Batch, levels: Sequence[float], losses: Tensor | None = None
) -> Gain | None:
    """Return the averaged model's gain from the captions of a batch, with fixed noise, at noise levels in (0, 1).

    Of a model that is conditioned on classes or images, from those, of several conditions from all together: see
    `Condition.exchange`. losses: those with the right conditions, as `DiffusionStep.held_out_losses` gives them, if
    they are known. Samples without a condition are left out. None if the others have no other conditions to exchange
    theirs with.
    """
    given = [condition.read(batch) for condition in step.conditions]
    nothing = [condition.nothing for condition in step.conditions]
    known = [row for row, values in enumerate(zip(*given, strict=True)) if not any(map(operator.eq, values, nothing))]
    exchanged = batch
    for condition, values in zip(step.conditions, given, strict=True):
        try:
            others = condition.exchange([values[row] for row in known])
        except ValueError:
            continue
        for row, other in zip(known, others, strict=True):
            values[row] = other
        exchanged = condition.replaced(exchanged, values)
    if exchanged is batch:
        return None
    if losses is None:
        losses = step.held_out_losses(batch, levels)
    gains = (step.held_out_losses(exchanged, levels) - losses)[:, known].double()
    error = float(gains.mean(0).std()) / math.sqrt(len(known))
    return Gain(gains.mean(1).tolist(), float(gains.mean()), error)
