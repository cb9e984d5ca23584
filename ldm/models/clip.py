"""Image embeddings of a frozen CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ldm.errors import explained
from ldm.models.component import find_component
from ldm.models.foreign import refuse_strange_shards
from ldm.models.network import network_hash
from ldm.models.quiet import quietly


class ImageEncoder(nn.Module):
    """A frozen CLIP vision model with projection, from images in [-1, 1] to embeddings."""

    def __init__(self, network: CLIPVisionModelWithProjection):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1), persistent=False)

    @property
    def key(self) -> str:
        """A name for what it computes: equal names, equal embeddings of equal images."""
        return network_hash(self.network)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the embeddings, (B, D) float32, of images (B, 3, H, W) in [-1, 1] of any size."""
        size = self.network.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            pixel_values = F.interpolate(pixel_values, size=(size, size), mode="bicubic", antialias=True)
        images = (pixel_values.clamp(-1, 1) + 1) / 2
        return self._embeds((images - self.mean) / self.std)

    @torch.no_grad()
    def zero_picture(self) -> Tensor:
        """Return the embedding, (D,), of an image that is zero everywhere once normalised: Kandinsky's null."""
        size = self.network.config.image_size
        return self._embeds(torch.zeros(1, 3, size, size, device=self.mean.device))[0]

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stay in eval mode."""
        return super().train(False)

    def _embeds(self, normalised: Tensor) -> Tensor:
        return cast(Tensor, self.network(normalised.to(self.network.dtype)).image_embeds.float())


@quietly()
def load_image_encoder(pretrained: str, where: str) -> ImageEncoder:
    """Return the image encoder in a folder or on the Hub (``user/name@revision`` too), alone or in a pipeline.

    A ConfigError names the config path `where`.
    """
    with explained(where):
        place, keywords = find_component(pretrained, ("image_encoder",))
        refuse_strange_shards(Path(place, keywords.get("subfolder", "")))
        network = CLIPVisionModelWithProjection.from_pretrained(
            place, use_safetensors=True, trust_remote_code=False, **keywords
        )
    return ImageEncoder(network)
