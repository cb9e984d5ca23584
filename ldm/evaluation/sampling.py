"""Images of a pipeline, one to a prompt: the same whatever else is drawn, and by however many processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ldm.models.pipeline import plain_call
from ldm.models.quiet import quietly
from ldm.models.vision import Images
from ldm.terminal import progress_bar

CHUNK = 50
"""Images that are drawn in one call of the pipeline."""


@quietly()
def sample_images(pipeline: Any, prompts: Sequence[Any], seed: int, asked: str = "prompt", **call: Any) -> Images:
    """Return one image per prompt, (N, H, W, 3) uint8; prompt i is drawn from seed + i whatever the others are.

    asked: the pipeline's keyword that takes the prompts, which may be others than texts: ``class_labels``; or
    ``batch_size``, which takes their number, as it does of prompts that are all None.

    Several processes share the prompts out by whole calls of the pipeline, so that what is drawn does not depend on
    their number; each returns all images. All of them must call it.
    """
    chunks = [(start, list(prompts[start : start + CHUNK])) for start in range(0, len(prompts), CHUNK)]
    state, plain = PartialState(), plain_call(pipeline)
    mine = chunks[state.process_index :: state.num_processes]
    drawn: list[tuple[int, Images]] = []
    with progress_bar(sum(len(part) for _, part in mine), "sampling", "image", not state.is_main_process) as bar:
        for start, part in mine:
            draws = [torch.Generator().manual_seed(seed + start + number) for number in range(len(part))]
            nothing = asked == "batch_size" or all(prompt is None for prompt in part)
            wanted = {"batch_size": len(part)} if nothing else {asked: part}
            images = pipeline(**wanted, **plain, generator=draws, output_type="np", **call).images
            drawn.append((start, (np.asarray(images) * 255).round().astype(np.uint8)))
            bar.update(len(part))
    parts = dict(gather_object(drawn))
    return np.concatenate([parts[start] for start, _ in chunks])
