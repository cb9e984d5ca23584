"""Frames of a clip that are given: the others go on from them, or fill in between (Blattmann et al. 2023, 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioners.conditioning import ConditioningBatch, Conditions, EncodedData, Inputs, checked_share


class FramesConditioner(nn.Module):
    """Given frames as 1 + C channels: a mask of the given frames, and their x0, zeros elsewhere. The null: none given.

    The number of given first frames is uniform from 0 to `max_context` for each clip. Of a share `between` of the clips
    the first and the last frame are given instead.
    """

    frozen = True
    asks: str | None = None
    given_size: int | None = None
    reads_pixels = False
    keywords: tuple[str, ...] = ()
    networks: Sequence[nn.Module] = ()

    def __init__(self, max_context: int, dropout: float, between: float = 0.0):
        super().__init__()
        if not 0 <= between <= 1:
            raise ValueError(f"conditioners.frames.between: got {between}; expected a share from 0 to 1")
        if max_context < (0 if between else 1):
            raise ValueError(f"conditioners.frames.max_context: got {max_context}; expected 1 or more, or between")
        self.max_context, self.between = max_context, between
        self.dropout = checked_share("conditioners.frames", dropout)

    @property
    def interpolates(self) -> bool:
        """True if it learns to fill in between a first and a last frame."""
        return self.between > 0

    def inputs(
        self, batch: ConditioningBatch, x0: Tensor, dropped: Sequence[bool], draws: Sequence[torch.Generator]
    ) -> Inputs:
        """Return ``frames``, (B, 1 + C, F, h, w), of clips x0, (B, C, F, h, w)."""
        least = max(self.max_context, 2 if self.interpolates else 0)
        if x0.ndim != 5 or x0.shape[2] <= least:
            raise ValueError(
                f"conditioners.frames: got x0 of shape {tuple(x0.shape)}; expected clips of more than the {least} "
                "frames that are given, (clips, channels, frames, height, width)"
            )
        num_frames = x0.shape[2]
        given = torch.stack(
            [
                torch.zeros(num_frames, dtype=torch.bool) if drop else self._given(num_frames, draw)
                for drop, draw in zip(dropped, draws, strict=True)
            ]
        )
        return {"frames": frames_given(x0, given)}

    def _given(self, num_frames: int, draw: torch.Generator) -> Tensor:
        """Return which frames of a clip are given, (F,) bool."""
        numbers = torch.arange(num_frames)
        if self.between and torch.rand((), generator=draw) < self.between:
            return (numbers == 0) | (numbers == num_frames - 1)
        return numbers < torch.randint(self.max_context + 1, (), generator=draw)

    def remember(self, data: EncodedData) -> None:
        """Keep nothing: no network computes the inputs."""

    def forward(self, frames: Tensor) -> Conditions:
        """Return mask and frames as channels."""
        return Conditions((frames,))


def frames_given(x0: Tensor, given: Tensor) -> Tensor:
    """Return mask and given frames, (B, 1 + C, F, h, w), of clips x0 (B, C, F, h, w); given: (B, F) bool."""
    mask = given[:, None, :, None, None].to(x0)
    return torch.cat([mask.expand(-1, -1, -1, *x0.shape[3:]), mask * x0], 1)
