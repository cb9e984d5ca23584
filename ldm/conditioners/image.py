"""The image itself, as its image embedding: what a prior predicts and a decoder is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.conditioners.conditioning import ConditioningBatch, Conditions, Inputs, checked_share
from ldm.models.clip import ImageEncoder

KEYWORD = "added_cond_kwargs.image_embeds"


class ImageConditioner(nn.Module):
    """Image embeddings, (B, D), as a U-Net with ``addition_embed_type: image`` or ``text_image`` takes them.

    The null is zeros (Ramesh et al. 2022, section 2.1), or as in Kandinsky 2.2 the embedding of a zero image.
    """

    frozen = True
    asks: str | None = None
    reads_pixels = True
    keywords = (KEYWORD,)

    def __init__(self, image_encoder: ImageEncoder, null: Literal["zeros", "zero_picture"], dropout: float):
        super().__init__()
        self.dropout = checked_share("conditioners.image", dropout)
        self.image_encoder = image_encoder
        zero_picture = image_encoder.zero_picture()
        self.null: Tensor
        self.register_buffer("null", zero_picture if null == "zero_picture" else torch.zeros_like(zero_picture))

    @property
    def networks(self) -> list[nn.Module]:
        """The image encoder."""
        return [self.image_encoder.network]

    def inputs(
        self, batch: ConditioningBatch, x0: Tensor, dropped: Sequence[bool], draws: Sequence[torch.Generator]
    ) -> Inputs:
        """Return ``image_embeds``, (B, D) float32."""
        if batch.pixel_values is None:
            raise ValueError("conditioners.image: needs images, and the batch has only encodings")
        embeds = self.image_encoder(batch.pixel_values.to(self.null.device))
        return {"image_embeds": torch.where(torch.tensor(dropped, device=embeds.device)[:, None], self.null, embeds)}

    def forward(self, image_embeds: Tensor) -> Conditions:
        """Return the embeddings."""
        return Conditions(kwargs={KEYWORD: image_embeds})
