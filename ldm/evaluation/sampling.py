"""Sampling for an evaluation: one image per prompt, independent of the other prompts and of the number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray

from ldm.models.pipeline import plain_call
from ldm.models.quiet import quietly
from ldm.models.vision import Images
from ldm.terminal import progress_bar

CHUNK = 50
"""Images, or frames of clips, that one call of the pipeline samples."""


def sample_images(
    pipeline: Any, prompts: Sequence[Any], seed: int, asked: str, also: Mapping[str, Sequence[Any]] = {}, **call: Any
) -> Images:
    """Return one image per prompt, (N, H, W, 3) uint8; the image of prompt i depends on it and on seed + i alone.

    asked: the keyword of the pipeline's call that takes the prompts, as in `Condition.keyword`. Where all prompts of a
    call are None, its ``batch_size`` is their number instead. also: more such values, one for each prompt, by keyword:
    lists, or tensors of rows.

    Several processes share the calls of the pipeline, so that the images do not depend on their number. All processes
    must call this, and each returns all images.
    """
    images = _sampled(pipeline, prompts, seed, asked, also, "images", output_type="np", **call)
    return (images * 255).round().astype(np.uint8)


def sample_clips(
    pipeline: Any, prompts: Sequence[Any], seed: int, asked: str, also: Mapping[str, Sequence[Any]] = {}, **call: Any
) -> Images:
    """Return one clip per prompt, (N, F, H, W, 3) uint8, of a pipeline of clips; else as `sample_images`."""
    clips = _sampled(pipeline, prompts, seed, asked, also, "frames", output_type="np", **call)
    return (clips * 255).round().astype(np.uint8)


def sample_embeds(
    pipeline: Any, prompts: Sequence[Any], seed: int, asked: str, also: Mapping[str, Sequence[Any]] = {}, **call: Any
) -> NDArray[np.float32]:
    """Return one image embedding per prompt, (N, D), of the pipeline of a prior; else as `sample_images`."""
    return _sampled(pipeline, prompts, seed, asked, also, "image_embeds", **call)


@quietly()
def _sampled(
    pipeline: Any,
    prompts: Sequence[Any],
    seed: int,
    asked: str,
    also: Mapping[str, Sequence[Any]],
    returned: str,
    **call: Any,
) -> NDArray[Any]:
    """Return what is in the field `returned` of the pipeline's outputs, one row for each prompt."""
    at_once = max(1, CHUNK // getattr(pipeline, "config", {}).get("num_frames", 1))
    chunks = [(start, list(prompts[start : start + at_once])) for start in range(0, len(prompts), at_once)]
    state, plain = PartialState(), plain_call(pipeline)
    mine = chunks[state.process_index :: state.num_processes]
    sampled: list[tuple[int, NDArray[Any]]] = []
    with progress_bar(sum(len(part) for _, part in mine), "sampling", "image", not state.is_main_process) as bar:
        for start, part in mine:
            generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(part))]
            nothing = all(prompt is None for prompt in part)
            wanted: dict[str, Any] = {"batch_size": len(part)} if nothing else {asked: part}
            rows = slice(start, start + len(part))
            wanted |= {name: of[rows] if torch.is_tensor(of) else list(of[rows]) for name, of in also.items()}
            output = getattr(pipeline(**wanted, **plain, generator=generators, **call), returned)
            sampled.append((start, output.cpu().numpy() if torch.is_tensor(output) else np.asarray(output)))
            bar.update(len(part))
    parts = dict(gather_object(sampled))
    return np.concatenate([parts[start] for start, _ in chunks])
