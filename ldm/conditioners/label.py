"""Classes, by number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioners.conditioning import ConditioningBatch, Conditions, EncodedData, Inputs, checked_share
from ldm.config.conditioners import UNKNOWN_CLASS


class LabelConditioner(nn.Module):
    """``class_labels``, whose embedding is the denoiser's; the null is one more class, number `num_classes`.

    UNet2DModel and UNet2DConditionModel then need ``num_class_embeds: num_classes + 1``; DiTTransformer2DModel has
    ``num_embeds_ada_norm: num_classes`` and adds the null itself.
    """

    frozen = True
    asks: str | None = "class_labels"
    given_size: int | None = None
    reads_pixels = False
    keywords = ("class_labels",)
    networks: Sequence[nn.Module] = ()

    def __init__(self, num_classes: int, dropout: float):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"conditioners.label.num_classes: got {num_classes}; expected 1 or more")
        self.num_classes = num_classes
        self.dropout = checked_share("conditioners.label", dropout)

    def inputs(
        self, batch: ConditioningBatch, x0: Tensor, dropped: Sequence[bool], draws: Sequence[torch.Generator]
    ) -> Inputs:
        """Return ``class_labels``, (B,) int64 in [0, num_classes]; the null where dropped or unknown."""
        labels = batch.class_labels
        if labels is None:
            raise ValueError("conditioners.label: the data has no classes; name their column in data.class_column")
        if int(labels.min()) < UNKNOWN_CLASS or int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"conditioners.label.num_classes: {self.num_classes}, but the data has a class "
                f"{int(labels.max() if labels.min() >= UNKNOWN_CLASS else labels.min())}; classes count from 0"
            )
        return {"class_labels": labels.masked_fill(torch.tensor(dropped) | (labels == UNKNOWN_CLASS), self.num_classes)}

    def remember(self, data: EncodedData) -> None:
        """Keep nothing: no network computes the inputs."""

    def forward(self, class_labels: Tensor) -> Conditions:
        """Return the labels."""
        return Conditions(kwargs={"class_labels": class_labels})
