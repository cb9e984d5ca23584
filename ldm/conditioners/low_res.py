"""The image itself, smaller: what a cascade's next stage makes large (Ho et al. 2022; Saharia et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioners.conditioning import ConditioningBatch, Conditions, EncodedData, Inputs
from ldm.config import ObjectiveConfig
from ldm.objectives.schedule import build_schedule


class LowResConditioner(nn.Module):
    """Three channels: the image at `image_size` pixels, enlarged again, with noise of a random level on it.

    The noise keeps the stage from trusting details that the stage before gets wrong. Its level is an integer timestep
    of the cosine path of 1000 steps, uniform below `noise_timesteps` for each sample. The denoiser is conditioned on it
    as ``class_labels`` (``class_embed_type: timestep``), as in DeepFloyd IF, whose sampler fixes it at 250. With
    `noise_timesteps` 0 there is neither. It is never dropped: the small image is always known.
    """

    frozen = True
    asks: str | None = None
    reads_pixels = True
    dropout = 0.0
    networks: Sequence[nn.Module] = ()

    def __init__(self, image_size: int, noise_timesteps: int):
        super().__init__()
        if image_size < 1:
            raise ValueError(f"conditioners.low_res.image_size: got {image_size} pixels; expected 1 or more")
        self.schedule = build_schedule(ObjectiveConfig(path="cosine"))
        last = ObjectiveConfig.num_train_timesteps
        if not 0 <= noise_timesteps <= last:
            raise ValueError(f"conditioners.low_res.noise_timesteps: got {noise_timesteps}; expected 0 to {last}")
        self.image_size, self.noise_timesteps = image_size, noise_timesteps

    @property
    def keywords(self) -> tuple[str, ...]:
        """The level's, if there is noise."""
        return ("class_labels",) if self.noise_timesteps else ()

    def inputs(
        self, batch: ConditioningBatch, x0: Tensor, dropped: Sequence[bool], draws: Sequence[torch.Generator]
    ) -> Inputs:
        """Return ``images``, (B, 3, H, W) float32, and with noise its ``levels``, (B,) int64."""
        if batch.pixel_values is None:
            raise ValueError("conditioners.low_res: needs images, and the batch has only encodings")
        images = enlarged(shrunk(batch.pixel_values.float(), self.image_size), batch.pixel_values.shape[-1])
        if not self.noise_timesteps:
            return {"images": images}
        levels = torch.stack([torch.randint(self.noise_timesteps, (), generator=draw) for draw in draws])
        noise = torch.stack([torch.randn(images.shape[1:], generator=draw) for draw in draws]).to(images)
        alpha, sigma = (level.view(-1, 1, 1, 1).to(images) for level in self.schedule.alpha_sigma(levels))
        return {"images": alpha * images + sigma * noise, "levels": levels}

    def remember(self, data: EncodedData) -> None:
        """Keep nothing: no network computes the inputs."""

    def forward(self, images: Tensor, levels: Tensor | None = None) -> Conditions:
        """Return the images as channels, and the levels."""
        return Conditions((images,), {} if levels is None else {"class_labels": levels})


def shrunk(pixel_values: Tensor, size: int) -> Tensor:
    """Return the images at `size` x `size` pixels, as a file of 8 bits would hold them, in [-1, 1]."""
    small = F.interpolate(pixel_values, size=(size, size), mode="bicubic", antialias=True)
    return ((small.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def enlarged(pixel_values: Tensor, size: int) -> Tensor:
    """Return the images at `size` x `size` pixels, as diffusers' IFSuperResolutionPipeline enlarges them."""
    return F.interpolate(pixel_values, size=(size, size), mode="bilinear", align_corners=True)
