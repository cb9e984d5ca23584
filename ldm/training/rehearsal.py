"""One step before the first: what a config's parts make of each other is seen before anything has cost time."""

from __future__ import annotations

import contextlib
import logging
import math

from ldm.data.batches import Batch, CaptionedImages, Sample, collate
from ldm.errors import ConfigError, explained
from ldm.models.network import unreached
from ldm.training.steps import Step

log = logging.getLogger(__name__)


def rehearse(step: Step, batch: Batch, where: str, global_step: int = -1) -> None:
    """Compute the losses of a batch as at `global_step`, -1: before the first; no weight changes, no gradient stays.

    where: the fields of the config that decide it, for errors.

    Raises:
        ConfigError: the parts do not fit together or give a loss that is not finite; or several processes would train
            a parameter that the loss does not depend on.

    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(explained(f"{where} do not fit together"))
        stack.enter_context(step.run.attention())
        for forward in step.forwards.values():
            stack.enter_context(step.run.accelerator.no_sync(forward))
        graphs = step.losses(batch, global_step)
        idle = [f"{name}.{idle}" for name, module in step.modules.items() for idle in unreached(module, [graphs[name]])]
        losses = {name: float(loss.detach()) for name, loss in graphs.items()}
        del graphs
    if wrong := [f"{name} {loss}" for name, loss in losses.items() if not math.isfinite(loss)]:
        raise ConfigError(f"{where}: the first losses are not finite ({', '.join(wrong)})")
    if idle:
        found = f"{where}: the loss does not depend on {len(idle)} parameters, such as {idle[0]}"
        if step.run.accelerator.num_processes > 1:
            raise ConfigError(f"{found}; several processes cannot train them: leave them out, or use one process")
        log.info("%s: they stay as they are", found)


def first_batch(images: CaptionedImages, count: int) -> Batch:
    """Return the first `count` images of the training split with their first captions, repeated if need be."""
    train = images.splits["train"]
    rows = [train[position % len(train)] for position in range(count)]
    size = images.config.crop_size or images.config.image_size
    captions = [next(iter(images.source.captions(row)), "") for row in rows]
    return collate(
        [
            Sample(position, row, caption, images.source.class_label(row), images.pixel_values(row)[..., :size, :size])
            for position, (row, caption) in enumerate(zip(rows, captions, strict=True))
        ]
    )
