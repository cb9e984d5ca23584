"""Frames of a clip that a call gives: checked and encoded, shown to the denoiser, and gone on from, pass by pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .image import RGB, GivenImages, given_images
from .inputs import MAX_GUIDANCE, shown


@dataclass(frozen=True)
class KnownFrames:
    """The known frames of clips."""

    latents: torch.Tensor
    """(B, C, F, h, w), zeros where a frame is not known."""
    given: torch.Tensor
    """The known frames, (F,) bool."""

    @property
    def first(self) -> int:
        """The number of frames that are known from the first one on."""
        return int(self.given.long().cumprod(0).sum())

    def context(self, start: int, stop: int) -> torch.Tensor:
        """Return mask and latents, (B, 1 + C, stop - start, h, w), of some frames; those past the end are not known."""
        shape, more = self.latents.shape, max(0, stop - self.latents.shape[2])
        latents = torch.cat([self.latents, self.latents.new_zeros(*shape[:2], more, *shape[3:])], 2)[:, :, start:stop]
        given = torch.cat([self.given, self.given.new_zeros(more)])[start:stop]
        mask = given.to(latents)[None, None, :, None, None].expand(shape[0], 1, -1, *shape[3:])
        return torch.cat([mask, mask * latents], 1)

    def with_frames(self, start: int, latents: torch.Tensor) -> "KnownFrames":
        """Return these and new frames from `start` on; what was known stays, and frames past the end are left out."""
        stop = min(len(self.given), start + latents.shape[2])
        whole, given = self.latents.clone(), self.given.clone()
        old = given[start:stop][None, None, :, None, None]
        whole[:, :, start:stop] = torch.where(old, whole[:, :, start:stop], latents[:, :, : stop - start])
        given[start:stop] = True
        return KnownFrames(whole, given)


class InContext:
    """A denoiser of clips that is shown known frames, with guidance by them (Blattmann et al. 2023, section 3.2).

    guidance_scale: the output goes from that without known frames towards that with them, times this; at 1 it is the
    latter, and one evaluation less.
    """

    def __init__(self, denoiser: Any, context: torch.Tensor, guidance_scale: float):
        self.denoiser, self.context, self.guidance_scale = denoiser, context, guidance_scale

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    def __call__(self, model_input: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        """Return the model output for clips (N * B, C, F, h, w), with the same context for each B of them."""
        context = self.context.to(model_input).repeat(len(model_input) // len(self.context), 1, 1, 1, 1)
        cond: torch.Tensor = self.denoiser(torch.cat([model_input, context], 1), **kwargs)[0]
        if self.guidance_scale == 1:
            return (cond,)
        uncond = self.denoiser(model_input, **kwargs)[0]
        return (uncond + self.guidance_scale * (cond - uncond),)


def passes(num_frames: int, known: int, window: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield the first frame of each pass of the denoiser, and the one after its last.

    window: frames of a clip that the model was trained on. A pass sees at most `most` of the frames before those that
    it makes; with 0 there is one pass, of all frames. The last pass may go past the end.
    """
    if not most or (num_frames <= window and known <= most):
        yield 0, num_frames
        return
    while known < num_frames:
        start = known - min(known, most)
        yield start, start + window
        known = start + window


def given_clips(name: str, given: Any) -> list[GivenImages]:
    """Return the clips in an argument of a call, the frames of each as `given_images` returns them.

    given: the frames of one clip, as images of PIL in a list, an array (F, height, width, 3) or a tensor (F, 3, height,
    width); or a list of such clips, or one more axis. ValueError if there are none, or of different lengths.
    """
    several = isinstance(given, np.ndarray | torch.Tensor) and given.ndim == 5
    if isinstance(given, list | tuple) and given:
        several = isinstance(given[0], list | tuple) or getattr(given[0], "ndim", 0) == 4
    clips = [*given] if several else [given]
    if not all(isinstance(clip, list | tuple | np.ndarray | torch.Tensor) for clip in clips):
        return [given_images(name, given, RGB, "white")]  # raises the error
    lengths = [len(clip) for clip in clips]
    if len({*lengths}) > 1:
        raise ValueError(f"{name}: got clips of {lengths} frames; expected clips of one length")
    # together, so that all of them are read in one range of values
    images = given_images(name, [frame for clip in clips for frame in clip], RGB, "white")
    return [images[start : start + lengths[0]] for start in range(0, len(images), max(1, lengths[0]))]


def check_context_guidance(context_guidance_scale: float) -> None:
    """Raise ValueError if `context_guidance_scale` is not a number from 1 to `MAX_GUIDANCE`."""
    if not isinstance(context_guidance_scale, int | float) or not 1 <= context_guidance_scale <= MAX_GUIDANCE:
        raise ValueError(
            f"context_guidance_scale: got {shown(context_guidance_scale)}; expected a number from 1 (none) to "
            f"{MAX_GUIDANCE:g}"
        )


def spread(name: str, encoded: Sequence[torch.Tensor], samples: int, copies: int) -> torch.Tensor:
    """Return what was encoded of each given image or clip, one for each of the samples.

    There is one for all, one for each prompt, which has so many `copies`, or one for each sample; ValueError otherwise.
    """
    if len(encoded) not in (1, samples // copies, samples):
        raise ValueError(f"{name}: got {len(encoded)} for {samples // copies} prompts; expected 1, or one a prompt")
    return torch.stack(list(encoded)).repeat_interleave(samples // len(encoded), 0)
