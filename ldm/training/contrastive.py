"""The training of a CLIP: from images and captions to a loss over the batch of all processes, and its validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from transformers import CLIPModel

from ldm.config import ClipConfig
from ldm.data.batches import Batch, CaptionedImages
from ldm.data.positions import generators
from ldm.errors import ConfigError
from ldm.evaluation.images import nearest_sheet, pixel_values
from ldm.evaluation.retrieval import feature_distances, ranks_among
from ldm.models.clip import embedded_captions, embedded_images, normalised, token_ids
from ldm.objectives.contrastive import contrastive_losses
from ldm.training.averages import Average, exponential
from ldm.training.checks import Truncation, truncation
from ldm.training.run import Run

log = logging.getLogger(__name__)


class Contrast(nn.Module):
    """A CLIP behind one forward, so that every process sees the same graph."""

    def __init__(self, clip: CLIPModel, max_logit_scale: float):
        super().__init__()
        self.clip, self.max_logit_scale = clip, max_logit_scale

    def forward(self, images: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings of images and texts, (B, D) of unit length, float32, and the inverse temperature."""
        output = self.clip(input_ids=input_ids, pixel_values=images)
        return output.image_embeds.float(), output.text_embeds.float(), self.logit_scale

    @property
    def logit_scale(self) -> Tensor:
        """The inverse temperature, with its upper limit."""
        scale: Tensor = self.clip.logit_scale.clamp(max=math.log(self.max_logit_scale)).exp()
        return scale.float()


class ContrastiveStep:
    """Image and caption encoders, compared over the batch of all processes."""

    networks: Sequence[str] = ()
    frozen: Mapping[str, str] = {}
    frozen_networks: Sequence[nn.Module] = ()

    def __init__(self, clip: CLIPModel, tokenizer: Any, config: ClipConfig, run: Run):
        self.run, self.config, self.tokenizer = run, config.contrastive, tokenizer
        run.switch(clip)
        module = Contrast(clip, config.contrastive.max_logit_scale).to(run.device).train()
        self.image_size = int(clip.config.vision_config.image_size)
        self.modules = {"clip": module}
        self.averages = {"clip": Average(module, exponential(config.optim.ema_decay))}
        self.forwards = {"clip": run.prepare(module)}
        self.memory: dict[str, Tensor] = {}

    @property
    def averaged(self) -> Contrast:
        """The CLIP with averaged weights."""
        return cast(Contrast, self.averages["clip"].module)

    def losses(self, batch: Batch, global_step: int) -> dict[str, Tensor]:
        """Return the loss of this process's pairs among those of all processes, and the inverse temperature.

        The mean over the processes, of losses and of gradients, is the loss of the whole batch.
        """
        images = cast(Tensor, batch.pixel_values).to(self.run.device)
        images = random_crops(images, generators(self.run.seed, batch.positions, "crop"), self.config.smallest_crop)
        input_ids = token_ids(self.tokenizer, batch.captions).to(self.run.device)
        images = normalised(images, self.image_size)
        image_embeds, text_embeds, logit_scale = self.forwards["clip"](images, input_ids)
        first = self.run.accelerator.process_index * len(image_embeds)
        losses = contrastive_losses(
            image_embeds, text_embeds, self._gathered(image_embeds), self._gathered(text_embeds), logit_scale, first
        )
        return {"clip": losses.mean(), "logit_scale": logit_scale.detach()}

    def _gathered(self, embeds: Tensor) -> Tensor:
        """Return the embeddings of all processes, whose gradients go back to each of them."""
        return embeds if self.run.accelerator.num_processes == 1 else torch.cat(all_gather(embeds))  # type: ignore[no-untyped-call]

    def after_step(self) -> None:
        """Keep nothing of a step but its weights."""

    def not_finite_at(self) -> list[float]:
        """Return nothing: no noise is added."""
        return []


def random_crops(pixel_values: Tensor, draws: Sequence[torch.Generator], smallest: float) -> Tensor:
    """Return a square crop of each image, (B, 3, H, W), enlarged to its size; `smallest`, in (0, 1]: least width."""
    if smallest == 1:
        return pixel_values
    sizes, rows, columns = torch.stack([torch.rand(3, generator=draw) for draw in draws]).T.to(pixel_values.device)
    widths = smallest + (1 - smallest) * sizes
    centres = (1 - widths)[:, None] * (2 * torch.stack([columns, rows], 1) - 1)
    affine = torch.cat([widths[:, None, None] * torch.eye(2, device=pixel_values.device), centres[..., None]], 2)
    grid = F.affine_grid(affine, list(pixel_values.shape), align_corners=False)
    return F.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)


class ContrastiveValidation:
    """Held-out loss, and retrieval among all distinct images and their captions, with the averaged weights."""

    def __init__(self, config: ClipConfig, images: CaptionedImages, step: ContrastiveStep, run: Run):
        self.config, self.images, self.step, self.run = config.validation, images, step, run
        first = ((row, next(iter(images.source.captions(row)), "")) for row in images.splits.filled("validation"))
        self.pairs = [(row, caption) for row, caption in first if caption]
        if not self.pairs:
            raise ConfigError(
                "data: no validation image has a caption; name captions in data.held_out, or hold out more"
            )

    @cached_property
    def truncation(self) -> Truncation:
        """The share of the training captions that the tokenizer cuts."""
        return truncation(self.step.tokenizer, self.images.captions("train"))

    @cached_property
    def _gallery(self) -> tuple[Tensor, Any, list[int]]:
        shown, place = self.images.gallery()
        return pixel_values(shown), shown, place

    def __call__(self, global_step: int) -> None:
        """Measure, log, show the nearest images of the first captions."""
        values, shown, place = self._gallery
        contrast, tokenizer = self.step.averaged, self.step.tokenizer
        images = embedded_images(contrast.clip, values)
        own = np.array([place[row] for row, _ in self.pairs])
        captions = [caption for _, caption in self.pairs]
        known = self.images.gallery_captions(place, dict(zip(own.tolist(), captions, strict=True)))
        texts = embedded_captions(contrast.clip, tokenizer, captions)
        all_texts = embedded_captions(contrast.clip, tokenizer, known)
        distances = feature_distances(texts.numpy(), images.numpy())
        found = ranks_among(distances, own)
        back = ranks_among(feature_distances(images[own].numpy(), all_texts.numpy()), own)
        scale = contrast.logit_scale.detach().cpu()
        losses = contrastive_losses(images[own], texts, images[own], texts, scale)
        metrics = {"validation/loss": float(losses.mean())}
        metrics |= {f"validation/r_at_{k}": float((found < k).mean()) for k in (1, 5)}
        metrics |= {f"validation/back_r_at_{k}": float((back < k).mean()) for k in (1, 5)}
        self.run.log_metrics(metrics, global_step)
        log.info(
            "step %d: held-out loss %.3f, R@1 of images %.3f, of captions %.3f",
            global_step,
            metrics["validation/loss"],
            metrics["validation/r_at_1"],
            metrics["validation/back_r_at_1"],
        )
        few = slice(self.config.num_images)
        sheet = nearest_sheet(captions[few], shown, own[few], distances[few])
        self.run.log_image("nearest", sheet, global_step)
