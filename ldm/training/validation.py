"""Validation of a diffusion stage: held-out loss, images, retrieval; always with the averaged weights."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ldm.config import StageConfig
from ldm.data.batches import Batch, CaptionedImages, PositionDataset, fixed_batch
from ldm.errors import ConfigError, explained
from ldm.evaluation.conditions import Condition
from ldm.evaluation.gain import LEVELS
from ldm.evaluation.images import comparison_sheet, written
from ldm.evaluation.samples import Samples
from ldm.models.resolution import shrunk_image
from ldm.training.checks import Scale, Truncation, conditional_gain, latent_scale, truncation
from ldm.training.run import Run
from ldm.training.steps import DiffusionStep

log = logging.getLogger(__name__)
SAID = {
    "validation/loss": "held-out loss",
    "conditional_gain/mean": "conditional gain",
    "validation/r_at_1": "R@1",
}
"""Metrics that are said of a validation, in words; all are in ``metrics.jsonl``."""


class Validation:
    """Held-out loss, a sheet of images and, if asked for, retrieval, at a step."""

    def __init__(
        self,
        config: StageConfig,
        images: CaptionedImages,
        step: DiffusionStep,
        pipeline: Any,
        samples: Samples,
        run: Run,
    ):
        self.config, self.images, self.step, self.pipeline, self.run = config.validation, images, step, pipeline, run
        self.samples = samples
        self.seed = config.seed
        self.rows = images.splits.filled("validation")

    @property
    def guided(self) -> bool:
        """Return whether the pipeline has guidance."""
        return "guidance_scale" in inspect.signature(self.pipeline.__call__).parameters

    @cached_property
    def levels(self) -> Sequence[float]:
        """The noise levels that losses are measured at: those that are trained."""
        return self.step.stage.objective.density.levels or LEVELS

    @cached_property
    def batch(self) -> Batch:
        """The held-out images that the loss is measured on, encoded once."""
        batch = fixed_batch(PositionDataset(self.images, "validation", self.seed), self.config.loss_images)
        return replace(batch, moments=self.step.encode(cast(Tensor, batch.pixel_values)))

    @cached_property
    def scale(self) -> Scale:
        """The scale of what is diffused, over the held-out batch."""
        return latent_scale(self.step.x0(self.batch))

    @cached_property
    def truncation(self) -> Truncation:
        """The share of the training captions that the tokenizer cuts; 0 without a tokenizer."""
        return truncation(self.step.tokenizer, self.images.captions("train"))

    @cached_property
    def sampled(self) -> list[int]:
        """The held-out rows that can be sampled: not those without a caption, where captions are asked for."""
        condition = self.step.condition
        return [row for row in self.rows if not (condition.worded and self.asked([row]) == [condition.nothing])]

    @property
    def ranked(self) -> list[int]:
        """The rows that R@k is measured on."""
        return self.sampled[: self.config.retrieval_images] if self.step.condition.worded else []

    @cached_property
    def _linear_loss(self) -> float:
        return float(self.step.held_out_losses(self.batch, self.levels, linear=True).mean())

    def rehearse(self) -> None:
        """Take the first of `num_inference_steps` sampling steps, and decode the result.

        Raises:
            ConfigError: the pipeline refuses, or its samples have another size than what they are compared with.

        """

        def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipeline._interrupt = True
            return {}

        with explained("validation or denoiser.sample_size"):
            sampled = self.sample(self.rows[:1], callback_on_step_end=stop)
        if fault := self.samples.fault(sampled):
            raise ConfigError(fault)

    def __call__(self, global_step: int) -> None:
        """Measure, log, sample."""
        metrics = self._losses()
        rows = self.sampled[: max(self.config.retrieval_images, self.config.num_images)]
        if rows:
            sampled = self.sample(rows)
            if self.ranked:
                own = np.array([self.samples.places[row] for row in self.ranked])
                ranks = self.samples.ranks(sampled[: len(own)], own)
                metrics |= {f"validation/r_at_{k}": float((ranks < k).mean()) for k in (1, 5)}
            shown = rows[: self.config.num_images]
            self.run.log_image("samples", self.sheet(shown, sampled[: len(shown)]), global_step)
        self.run.log_metrics(metrics, global_step)
        said = [f"{words} {metrics[name]:.4f}" for name, words in SAID.items() if name in metrics]
        log.info("step %d: %s", global_step, ", ".join(said))

    def _losses(self) -> dict[str, float]:
        """Return the held-out loss, what captions and model are worth in it, and the scale of the latents.

        ``explained_share``: 1 - loss / loss of `Objective.linear_output`; below 0 at first, 0 for a model that knows of
        the latents only their scale, 1 if all is known.
        """
        losses = self.step.held_out_losses(self.batch, self.levels)
        gain = conditional_gain(self.step, self.batch, self.levels, losses)
        metrics = {
            "validation/loss": float(losses.mean()),
            **self._by_level("validation/loss_at", losses.mean(1).tolist()),
        }
        metrics["explained_share"] = 1 - metrics["validation/loss"] / self._linear_loss
        if gain is not None:
            metrics |= {
                "conditional_gain/mean": gain.mean,
                "conditional_gain/standard_error": gain.standard_error,
                **self._by_level("conditional_gain/at", gain.by_level),
            }
        metrics |= {"latents/mean": self.scale.mean, "latents/std": self.scale.std}
        if self.step.tokenizer is None:
            return metrics
        return metrics | {"captions/cut": self.truncation.captions, "captions/cut_tokens": self.truncation.tokens}

    def asked(self, rows: Sequence[int]) -> list[Any]:
        """Return the first condition of images: captions, "" where there is none; or classes, None likewise."""
        return [self._given(self.step.condition, row) for row in rows]

    def _given(self, condition: Condition, row: int) -> Any:
        """Return the condition of an image as a call takes it: of images that are to be small, small ones."""
        value, size = condition.of(self.images, row), self.step.given_sizes[condition.keyword]
        return value if size is None else shrunk_image(value, size)

    def sheet(self, rows: Sequence[int], sampled: NDArray[Any]) -> Image.Image:
        """Return a sheet of samples over the true images of the rows, with their conditions as a text."""
        return comparison_sheet(written(self.asked(rows)), self.samples.shown(sampled), self.samples.true(rows))

    def sample(
        self, rows: Sequence[int], pipeline: Any | None = None, asked: Sequence[Any] | None = None, **more: Any
    ) -> NDArray[Any]:
        """Return a sample of the conditions of each row, by `Samples.sample`.

        pipeline: one that takes the place of the stage's. asked: the first condition of each row, if not its own.
        """
        pipeline, asked = pipeline or self.pipeline, asked or self.asked(rows)
        takes, keyword = inspect.signature(pipeline.__call__).parameters, self.step.condition.keyword
        call = {"num_inference_steps": self.config.num_inference_steps, "guidance_scale": self.config.guidance_scale}
        call = {name: value for name, value in (call | more).items() if name in takes}
        also = {one.keyword: [self._given(one, row) for row in rows] for one in self.step.conditions[1:]}
        return self.samples.sample(pipeline, asked, self.seed, keyword, also, **call)

    def _by_level(self, name: str, values: Sequence[float]) -> dict[str, float]:
        return {f"{name}_{level:.2f}": value for level, value in zip(self.levels, values, strict=True)}
