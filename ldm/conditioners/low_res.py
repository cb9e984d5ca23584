"""The image itself, smaller: what a cascade's next stage makes large (Ho et al. 2022; Saharia et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ldm.conditioners.conditioning import ConditioningBatch, Conditions, EncodedData, Inputs
from ldm.config import ObjectiveConfig
from ldm.models.resolution import blurred, enlarged, shrunk
from ldm.objectives.schedule import build_schedule


class LowResConditioner(nn.Module):
    """Three channels: the image at `image_size` pixels, enlarged again, with noise of a random level on it.

    The noise keeps the stage from trusting details that the stage before gets wrong. Its level is an integer timestep
    of the cosine path of 1000 steps, uniform below `noise_timesteps` for each sample. The denoiser is conditioned on it
    as ``class_labels`` (``class_embed_type: timestep``), as in DeepFloyd IF, whose sampler fixes it at 250. With
    `noise_timesteps` 0 there is neither. It is never dropped: the small image is always known.

    With `blur` above 0 the small image is blurred, by a standard deviation in its pixels that is uniform from 0 to
    `blur` for each sample: what the stage before samples is less sharp than a true image (Ramesh et al. 2022, section
    2.1). Of images that are crops, the small ones are crops too: `whole_size` is the size of whole images.
    """

    frozen = True
    asks: str | None = "image"
    reads_pixels = True
    dropout = 0.0
    networks: Sequence[nn.Module] = ()

    def __init__(self, image_size: int, noise_timesteps: int, blur: float = 0.0, whole_size: int | None = None):
        super().__init__()
        if image_size < 1:
            raise ValueError(f"conditioners.low_res.image_size: got {image_size} pixels; expected 1 or more")
        self.schedule = build_schedule(ObjectiveConfig(path="cosine"))
        last = ObjectiveConfig.num_train_timesteps
        if not 0 <= noise_timesteps <= last:
            raise ValueError(f"conditioners.low_res.noise_timesteps: got {noise_timesteps}; expected 0 to {last}")
        self.image_size, self.noise_timesteps, self.blur, self.whole_size = (
            image_size,
            noise_timesteps,
            blur,
            whole_size,
        )

    @property
    def given_size(self) -> int:
        """The size of the images that a call takes."""
        return self.image_size

    @property
    def noising_scheduler(self) -> DDPMScheduler:
        """The scheduler that adds noise of a level to small images, for pipelines."""
        steps = ObjectiveConfig.num_train_timesteps
        return DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2")

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
        pixel_values, size = batch.pixel_values.float(), batch.pixel_values.shape[-1]
        small = shrunk(pixel_values, self.image_size * size // (self.whole_size or size))
        if self.blur:
            deviations = torch.stack([self.blur * torch.rand((), generator=draw) for draw in draws])
            small = blurred(small, deviations.to(small), max(1, math.ceil(2 * self.blur)))
        images = enlarged(small, size)
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
