"""The contrastive objective of CLIP (Radford et al. 2021, section 2.3 and figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    all_image_embeds: Tensor,
    all_text_embeds: Tensor,
    logit_scale: Tensor,
    first: int = 0,
) -> Tensor:
    """Return the loss of each pair, (B,): the mean of the cross-entropies over all texts and over all images.

    image_embeds, text_embeds: (B, D) of unit length; pair i is one image and its text. all_image_embeds,
    all_text_embeds: (N, D), those of the whole batch; pair i is number ``first + i`` in them. logit_scale: the inverse
    temperature. The mean over the whole batch is the loss of the paper.
    """
    own = torch.arange(first, first + len(image_embeds), device=image_embeds.device)
    of_images = F.cross_entropy(logit_scale * image_embeds @ all_text_embeds.T, own, reduction="none")
    of_texts = F.cross_entropy(logit_scale * text_embeds @ all_image_embeds.T, own, reduction="none")
    return (of_images + of_texts) / 2
