"""The conditional gain: how much the captions lower a model's loss on held-out images.

The loss is measured with each image's own caption and with the caption of another. A model that ignores its text has a
gain of 0 at every noise level, however good its images look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.evaluation.baselines import exchanged_captions
from ldm.models.autoencoder import posterior_moments
from ldm.models.quiet import quietly
from ldm.models.scheduler import schedule_of
from ldm.objectives.schedule import target_coefficients

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels: 0 is the image, 1 is noise."""
CHUNK = 50
Losses = NDArray[np.float64]
"""(levels, N): the squared error of each image at each noise level, averaged over its elements."""


@quietly()
def losses_with_and_without(
    pipeline: Any, pixel_values: Tensor, captions: Sequence[str], seed: int, levels: Sequence[float] = LEVELS
) -> tuple[Losses, Losses]:
    """Return the losses of images, (N, 3, H, W) in [-1, 1], with their own captions and with captions of others.

    The noise is the same for both. The second minus the first is the conditional gain. No image keeps its caption, nor
    gets one with the same words. Raises ValueError as `conditions_of`, and where more than half of the captions are the
    same.
    """
    own = denoising_losses(pipeline, pixel_values, captions, seed, levels)
    return own, denoising_losses(pipeline, pixel_values, exchanged_captions(captions, seed), seed, levels)


def conditions_of(pipeline: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return the function that makes the denoiser's keywords of prompt embeddings.

    It is the pipeline's own `conditions`, as ours have it, or that of a U-Net that reads nothing but the embeddings.

    Raises:
        ValueError: the pipeline has no autoencoder or no prompt; or it is not known what its denoiser reads.

    """
    unet = pipeline.components.get("unet")
    if "vae" in pipeline.components and hasattr(pipeline, "encode_prompt"):
        if hasattr(pipeline, "conditions"):
            return cast("Callable[[Tensor], dict[str, Tensor]]", pipeline.conditions)
        if unet is not None and unet.config.get("cross_attention_dim") and not unet.config.get("addition_embed_type"):
            return lambda embeds: {"encoder_hidden_states": embeds}
    raise ValueError(
        f"got a {type(pipeline).__name__}; expected a pipeline with an autoencoder and a prompt, ours or with a U-Net "
        "that reads nothing but the prompt"
    )


@torch.no_grad()
def denoising_losses(
    pipeline: Any, pixel_values: Tensor, captions: Sequence[str], seed: int, levels: Sequence[float] = LEVELS
) -> Losses:
    """Return the unweighted loss of the pipeline's denoiser on images, (N, 3, H, W) in [-1, 1].

    x0 is the mean of the latents' posterior. The noise of an image depends on the seed and its place alone.
    """
    conditions_from = conditions_of(pipeline)
    schedule, prediction_type = schedule_of(pipeline.scheduler)
    denoiser = pipeline.components.get("unet") or pipeline.transformer
    device = denoiser.device
    losses = np.empty((len(levels), len(captions)))
    for start in range(0, len(captions), CHUNK):
        rows = slice(start, min(start + CHUNK, len(captions)))
        x0 = posterior_moments(pipeline.vae, pixel_values[rows].to(device, pipeline.vae.dtype))[0].float()
        embeds = pipeline.encode_prompt(list(captions[rows]), device, 1, False)[0]
        conditions = conditions_from(embeds)
        generators = [torch.Generator().manual_seed(seed + row) for row in range(rows.start, rows.stop)]
        noise = torch.stack([torch.randn(x0.shape[1:], generator=each) for each in generators]).to(x0)
        for number, level in enumerate(levels):
            timesteps = schedule.timesteps(torch.full((len(x0),), float(level)))
            alpha, sigma = (of.to(device).view(-1, 1, 1, 1) for of in schedule.alpha_sigma(timesteps))
            a, b = target_coefficients(prediction_type, alpha, sigma)
            x_t = (alpha * x0 + sigma * noise).to(denoiser.dtype)
            model_output = denoiser(x_t, timestep=timesteps.to(device), **conditions, return_dict=False)[0]
            error = model_output[:, : x0.shape[1]].float() - (a * x0 + b * noise)
            losses[number, rows] = error.square().flatten(1).mean(1).cpu().numpy()
    return losses
