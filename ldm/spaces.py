"""The spaces to diffuse in: ``pixel_values`` are encoded to tensors of unit scale, and decoded back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.config import SpaceConfig
from ldm.errors import ConfigError, explained
from ldm.models import autoencoder as ae
from ldm.models.bottleneck import bottleneck_of
from ldm.models.clip import ImageEncoder, load_image_encoder
from ldm.models.network import AUTOENCODERS, build_network, network_hash
from ldm.models.resolution import shrunk
from ldm.models.temporal import VideoAutoencoder
from ldm.objectives.variational import GREY_STEP


@dataclass(frozen=True)
class Moments:
    """Mean and std of a diagonal Gaussian over x0, each (B, C, ...) float32; std 0 where encoding is exact."""

    mean: Tensor
    std: Tensor

    def sample(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return a sample of x0 from the Gaussian; each row of the batch uses its own CPU generator."""
        noise = torch.stack([torch.randn(self.mean.shape[1:], generator=generator) for generator in generators])
        return self.mean + self.std * noise.to(self.mean.device)


class Space(Protocol):
    """A space to diffuse in."""

    key: str
    """Name of the encoding: with equal keys, equal images have equal `moments`."""
    frozen: bool
    """True if `moments` runs a frozen network or makes images smaller, so that its results are worth caching."""
    grid_step: float
    """Distance between neighbouring values of x0; 0 if x0 is continuous."""
    statistics: tuple[Tensor, Tensor] | None
    """Mean and std, (C,), of the normalisation. The denoiser stores them, and its pipeline undoes it. None: none."""
    clipped: bool
    """True if x0 is an image in [-1, 1], so that a sampler may clip it."""
    images: bool
    """True if `decode` returns images; False: embeddings."""
    networks: tuple[nn.Module, ...]
    """Networks that encode and decode; `moments` and `decode` compute on their device."""

    def moments(self, pixel_values: Tensor) -> Moments:
        """Return the distribution of x0 for images (B, 3, H, W) in [-1, 1], or clips (B, F, 3, H, W); no gradient.

        That of clips is (B, C, F, h, w), and each frame is encoded as an image.
        """

    def decode(self, x0: Tensor) -> Tensor:
        """Return x0 decoded: pixel values, not clipped, of images or clips, or (B, D) embeddings."""


def frame_by_frame(compute: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """Return what `compute` makes of images, (N, C, H, W), for each of (..., C, H, W): (..., C', H', W')."""
    found = compute(frames.flatten(0, -4))
    return found.view(*frames.shape[:-3], *found.shape[1:])


def time_last(frames: Tensor) -> Tensor:
    """Return frames (B, F, C, H, W) as the denoisers of clips take them, (B, C, F, H, W); images as they are."""
    return frames.movedim(-3, 1)


def time_first(clips: Tensor) -> Tensor:
    """Return clips (B, C, F, H, W) frame by frame, (B, F, C, H, W); images as they are."""
    return clips.movedim(1, -3)


class PixelSpace:
    """The images themselves, or smaller ones of `image_size` pixels."""

    clipped = True
    images = True
    grid_step = GREY_STEP
    statistics: tuple[Tensor, Tensor] | None = None
    networks: tuple[nn.Module, ...] = ()

    def __init__(self, image_size: int | None = None):
        self.image_size = image_size
        self.frozen = image_size is not None
        self.key = "pixel" if image_size is None else f"pixel-{image_size}"

    def moments(self, pixel_values: Tensor) -> Moments:
        """Return the images with std 0."""
        if self.image_size is not None:
            pixel_values = frame_by_frame(partial(shrunk, size=self.image_size), pixel_values)
        x0 = time_last(pixel_values)
        return Moments(x0, torch.zeros_like(x0))

    def decode(self, x0: Tensor) -> Tensor:
        """Return x0, of clips frame by frame."""
        return time_first(x0)


class LatentSpace:
    """The latents of a frozen autoencoder."""

    frozen = True
    clipped = False
    images = True
    grid_step = 0.0
    statistics: tuple[Tensor, Tensor] | None = None

    def __init__(self, autoencoder: ae.Autoencoder):
        """Fold the scale of the latents in the autoencoder's config into its weights, in place (`fold_config`)."""
        bottleneck_of(autoencoder).fold_config(autoencoder)
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.networks: tuple[nn.Module, ...] = (self.autoencoder,)
        self.key = f"latent-{network_hash(autoencoder)}"

    @torch.no_grad()
    def moments(self, pixel_values: Tensor) -> Moments:
        """Return mean and std of the posterior, (B, C, H/f, W/f), or of clips (B, C, F, H/f, W/f)."""
        factor, size = ae.downsampling_factor(self.autoencoder), pixel_values.shape[-1]
        if size % factor:
            near = size // factor * factor
            raise ValueError(
                f"data.image_size {size} is not a multiple of the autoencoder's factor {factor}; "
                f"{near} and {near + factor} are"
            )
        parameter = next(self.autoencoder.parameters())
        flat = pixel_values.flatten(0, -4).to(parameter.device, parameter.dtype)
        both = (part.float() for part in ae.posterior_moments(self.autoencoder, flat))
        return Moments(*(time_last(part.view(*pixel_values.shape[:-3], *part.shape[1:])) for part in both))

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Return the images of latents, of clips frame by frame unless the decoder has temporal layers."""
        parameter = next(self.autoencoder.parameters())
        x0 = x0.to(parameter.device, parameter.dtype)
        if isinstance(self.autoencoder, VideoAutoencoder) and x0.ndim == 5:
            parts = torch.split(x0, max(1, ae.CHUNK // x0.shape[2]))
            return time_first(torch.cat([ae.decode(self.autoencoder, part) for part in parts])).float()
        return frame_by_frame(partial(ae.decode, self.autoencoder), time_first(x0)).float()


class EmbeddingSpace:
    """The embeddings of a frozen image encoder, each dimension brought to zero mean and unit std."""

    frozen = True
    clipped = False
    images = False
    grid_step = 0.0
    statistics: tuple[Tensor, Tensor] | None

    def __init__(self, image_encoder: ImageEncoder, images: Tensor):
        """Take the statistics from `images`, (N, 3, H, W) in [-1, 1], at least two."""
        self.image_encoder = image_encoder
        self.networks: tuple[nn.Module, ...] = (image_encoder,)
        embeds = torch.cat([image_encoder(some).cpu() for some in torch.split(images, 64)])
        mean, std = embeds.mean(0), embeds.std(0)
        if not (std > 0).all():
            raise ValueError(f"{int((std <= 0).sum())} dimensions of the image embeddings are equal for all images")
        self.statistics, self.mean, self.std = (mean, std), mean, std
        self.key = f"embedding-{image_encoder.key}-{float(mean.sum()):.6g}-{float(std.sum()):.6g}"

    def moments(self, pixel_values: Tensor) -> Moments:
        """Return the embeddings, (B, D), with std 0."""
        embeds = self.image_encoder(pixel_values.to(self.image_encoder.device))
        normalised = (embeds - self.mean.to(embeds)) / self.std.to(embeds)
        return Moments(normalised, torch.zeros_like(normalised))

    def decode(self, x0: Tensor) -> Tensor:
        """Return the embeddings as the image encoder computes them: the normalisation is undone."""
        return x0 * self.std.to(x0) + self.mean.to(x0)


def build_space(config: SpaceConfig, images: Callable[[], Tensor] | None = None) -> Space:
    """Return the space that `config` names; `images` returns training images, for its statistics."""
    if config.kind == "pixel":
        return PixelSpace(config.image_size)
    if config.kind == "embedding":
        if config.image_encoder is None:
            raise ConfigError("space.image_encoder: required with space.kind embedding; a CLIP vision model's folder")
        if images is None:
            raise ValueError("an embedding space needs training images for its statistics")
        return EmbeddingSpace(load_image_encoder(config.image_encoder, "space.image_encoder"), images())
    if config.autoencoder is None:
        raise ConfigError("space.autoencoder: required with space.kind latent; train one with train_vae.py")
    network = build_network({"pretrained": config.autoencoder}, "space.autoencoder", AUTOENCODERS)
    with explained("space.autoencoder"):
        return LatentSpace(network.float())
