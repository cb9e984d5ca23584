"""The first frames of a clip, which the others continue (Blattmann et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioners.conditioning import ConditioningBatch, Conditions, EncodedData, Inputs, checked_share


class FramesConditioner(nn.Module):
    """Given frames as 1 + C channels: a mask of the given frames, and their x0, zeros elsewhere. The null: none given.

    The number of given frames is uniform from 0 to `max_context` for each clip.
    """

    frozen = True
    asks: str | None = None
    given_size: int | None = None
    reads_pixels = False
    keywords: tuple[str, ...] = ()
    networks: Sequence[nn.Module] = ()

    def __init__(self, max_context: int, dropout: float):
        super().__init__()
        if max_context < 1:
            raise ValueError(f"conditioners.frames: got max_context {max_context}; expected 1 or more")
        self.max_context = max_context
        self.dropout = checked_share("conditioners.frames", dropout)

    def inputs(
        self, batch: ConditioningBatch, x0: Tensor, dropped: Sequence[bool], draws: Sequence[torch.Generator]
    ) -> Inputs:
        """Return ``frames``, (B, 1 + C, F, h, w), of clips x0, (B, C, F, h, w)."""
        if x0.ndim != 5 or x0.shape[2] <= self.max_context:
            raise ValueError(
                f"conditioners.frames: got x0 of shape {tuple(x0.shape)}; expected clips of more than max_context "
                f"{self.max_context} frames, (clips, channels, frames, height, width)"
            )
        counts = [
            0 if drop else int(torch.randint(self.max_context + 1, (), generator=draw))
            for drop, draw in zip(dropped, draws, strict=True)
        ]
        given = torch.arange(x0.shape[2]) < torch.tensor(counts)[:, None]
        given = given[:, None, :, None, None].to(x0)
        return {"frames": torch.cat([given.expand(-1, -1, -1, *x0.shape[3:]), given * x0], 1)}

    def remember(self, data: EncodedData) -> None:
        """Keep nothing: no network computes the inputs."""

    def forward(self, frames: Tensor) -> Conditions:
        """Return mask and frames as channels."""
        return Conditions((frames,))
