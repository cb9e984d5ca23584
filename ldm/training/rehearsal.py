"""One step before the first: what a config's parts make of each other is seen before anything has cost time."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from typing import cast

import torch
from torch import Tensor

from ldm.config import AutoencoderConfig, StageConfig
from ldm.data.batches import Batch, CaptionedImages, Sample, collate
from ldm.errors import ConfigError, explained
from ldm.evaluation.quality import ssim
from ldm.models.autoencoder import fold_statistics, reconstruct
from ldm.models.network import unreached
from ldm.training.steps import AutoencoderStep, DiffusionStep

log = logging.getLogger(__name__)


def rehearse(
    step: DiffusionStep | AutoencoderStep, images: CaptionedImages, config: StageConfig | AutoencoderConfig
) -> None:
    """Compute the losses of the first training pictures, two or a clip of them; no weight changes, no gradient stays.

    Of an autoencoder also what validation and saving need.

    Raises:
        ConfigError: the parts do not fit together or give a loss that is not finite; or several processes would train
            a parameter that the loss does not depend on.

    """
    frames = config.conditioners.frames if isinstance(config, StageConfig) else None
    batch = first_batch(images, frames.num_frames if frames else 2)
    pictures = cast(Tensor, batch.pixel_values)
    if isinstance(config, StageConfig):
        parts, start = "denoiser, space, conditioners, objective", 0
    else:
        parts, start = "autoencoder, reconstruction", config.reconstruction.discriminator_start_step
    where = f"{parts}, data.image_size {config.data.image_size}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(explained(f"{where} do not fit together"))
        stack.enter_context(step.run.attention())
        for forward in step.forwards.values():
            stack.enter_context(step.run.accelerator.no_sync(forward))
        graphs = step.losses(batch, start)
        idle = [f"{name}.{idle}" for name, module in step.modules.items() for idle in unreached(module, [graphs[name]])]
        losses = {name: float(loss.detach()) for name, loss in graphs.items()}
        del graphs
        if isinstance(step, AutoencoderStep):
            ssim(reconstruct(step.averaged, pictures), pictures)
            channels = torch.ones(step.latent_channels, device=step.run.device)
            fold_statistics(copy.deepcopy(step.averaged), 0 * channels, channels)
    if wrong := [f"{name} {loss}" for name, loss in losses.items() if not math.isfinite(loss)]:
        raise ConfigError(f"{where}: the first losses are not finite ({', '.join(wrong)})")
    if idle:
        found = f"{where}: the loss does not depend on {len(idle)} parameters, such as {idle[0]}"
        if step.run.accelerator.num_processes > 1:
            raise ConfigError(f"{found}; several processes cannot train them: leave them out, or use one process")
        log.info("%s: they stay as they are", found)


def first_batch(images: CaptionedImages, count: int) -> Batch:
    """Return the first `count` pictures of the training split with their first captions, repeated if need be."""
    train = images.splits["train"]
    rows = [train[position % len(train)] for position in range(count)]
    captions = [next(iter(images.source.captions(row)), "") for row in rows]
    return collate(
        [
            Sample(position, row, caption, images.source.class_label(row), images.pixel_values(row))
            for position, (row, caption) in enumerate(zip(rows, captions, strict=True))
        ]
    )
