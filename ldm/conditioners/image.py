"""The embedding of the image itself: the target of a prior, the condition of a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.conditioners.conditioning import ConditioningBatch, Conditions, EncodedData, Inputs, View, checked_share
from ldm.models.clip import ImageEncoder

KEYWORD = "added_cond_kwargs.image_embeds"


class ImageConditioner(nn.Module):
    """Image embeddings, (B, D), as a U-Net with ``addition_embed_type: image`` or ``text_image`` takes them.

    The null is zeros (Ramesh et al. 2022, section 2.1), or as in Kandinsky 2.2 the embedding of a zero image.
    """

    frozen = True
    asks: str | None = "image"
    given_size: int | None = None
    keywords = (KEYWORD,)

    def __init__(self, image_encoder: ImageEncoder, null: Literal["zeros", "zero_picture"], dropout: float):
        super().__init__()
        self.dropout = checked_share("conditioners.image", dropout)
        self.image_encoder = image_encoder
        zero_picture = image_encoder.zero_picture()
        self.null_name = null
        self.null: Tensor
        self.register_buffer("null", zero_picture if null == "zero_picture" else torch.zeros_like(zero_picture))
        self._remembered: Mapping[View, Inputs] | None = None

    @property
    def networks(self) -> list[nn.Module]:
        """The image encoder."""
        return [self.image_encoder.network]

    @property
    def reads_pixels(self) -> bool:
        """True until `remember`."""
        return self._remembered is None

    def inputs(
        self, batch: ConditioningBatch, x0: Tensor, dropped: Sequence[bool], draws: Sequence[torch.Generator]
    ) -> Inputs:
        """Return ``image_embeds``, (B, D) float32."""
        if self._remembered is not None:
            rows = [self._remembered[view]["image_embeds"] for view in batch.views]
            embeds = torch.stack(rows).to(self.null.device)
        elif batch.pixel_values is not None:
            embeds = self.encode(batch.pixel_values)["image_embeds"]
        else:
            raise ValueError("conditioners.image: needs images, and the batch has only encodings")
        return {"image_embeds": torch.where(torch.tensor(dropped, device=embeds.device)[:, None], self.null, embeds)}

    def encode(self, pixel_values: Tensor) -> Inputs:
        """Return ``image_embeds``, (B, D) float32, of images (B, 3, H, W) in [-1, 1]."""
        return {"image_embeds": self.image_encoder(pixel_values.to(self.null.device))}

    def remember(self, data: EncodedData) -> None:
        """Look up the images of `data`: from now on no pixels are read for it."""
        self._remembered = data.encoded_images("image-embeddings", self.image_encoder.key, self.encode)

    def forward(self, image_embeds: Tensor) -> Conditions:
        """Return the embeddings."""
        return Conditions(kwargs={KEYWORD: image_embeds})
