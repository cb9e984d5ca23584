"""The first frames of a clip, which the others continue (Blattmann et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioners.conditioning import ConditioningBatch, Conditions, EncodedData, Inputs, checked_share


class FramesConditioner(nn.Module):
    """Given frames as 1 + C channels: a mask of the given frames, and their x0, zeros elsewhere. The null: none given.

    A batch is whole clips, frame after frame: B = clips * num_frames. The number of given frames is uniform from 0 to
    `max_context` for each clip.
    """

    frozen = True
    asks: str | None = None
    given_size: int | None = None
    reads_pixels = False
    keywords: tuple[str, ...] = ()
    networks: Sequence[nn.Module] = ()

    def __init__(self, num_frames: int, max_context: int, dropout: float):
        super().__init__()
        if not 0 < max_context < num_frames:
            raise ValueError(
                f"conditioners.frames: got max_context {max_context} of num_frames {num_frames}; expected at least 1 "
                "given frame and one to predict"
            )
        self.num_frames, self.max_context = num_frames, max_context
        self.dropout = checked_share("conditioners.frames", dropout)

    def inputs(
        self, batch: ConditioningBatch, x0: Tensor, dropped: Sequence[bool], draws: Sequence[torch.Generator]
    ) -> Inputs:
        """Return ``frames``, (B, 1 + C, h, w); a clip's draw and drop are those of its first frame."""
        if len(x0) % self.num_frames:
            raise ValueError(
                f"a batch of {len(x0)} frames is no number of whole clips of {self.num_frames}; set data.batch_size "
                f"to a multiple of {self.num_frames} for each process and accumulation step"
            )
        given = torch.zeros(len(x0), 1, *[1] * (x0.ndim - 2))
        for first in range(0, len(x0), self.num_frames):
            count = int(torch.randint(self.max_context + 1, (), generator=draws[first]))
            given[first : first + (0 if dropped[first] else count)] = 1
        given = given.to(x0)
        return {"frames": torch.cat([given.expand(-1, 1, *x0.shape[2:]), given * x0], 1)}

    def remember(self, data: EncodedData) -> None:
        """Keep nothing: no network computes the inputs."""

    def forward(self, frames: Tensor) -> Conditions:
        """Return mask and frames as channels."""
        return Conditions((frames,))
