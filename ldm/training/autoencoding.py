"""Measures of an autoencoder, of images or clips: its reconstructions and the scale of its latents."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.data.batches import Batch, PositionDataset, fixed_batch
from ldm.data.pixels import to_uint8
from ldm.errors import explained
from ldm.evaluation.images import image_grid
from ldm.evaluation.quality import flicker, psnr, ssim
from ldm.models.autoencoder import CHUNK, Autoencoder, fold_statistics, posterior_moments, reconstruct
from ldm.models.bottleneck import bottleneck_of
from ldm.models.features import PerceptualDistance, build_perceptual_distance
from ldm.models.temporal import VideoAutoencoder
from ldm.spaces import time_first, time_last

log = logging.getLogger(__name__)
SMALLEST = 32
"""Pixels."""


def measuring_distance(image_size: int) -> PerceptualDistance | None:
    """Return the distance that held-out reconstructions are measured with, None if there is none.

    There is none without its packages, and for images below `SMALLEST` pixels: its convolutions need more.
    EfficientNet-lite0: nothing is ever trained against it.
    """
    if image_size < SMALLEST:
        log.info("held-out perceptual distance is not measured below %d pixels", SMALLEST)
        return None
    try:
        return build_perceptual_distance("efficientnet_lite0")
    except ImportError as error:
        log.info("held-out perceptual distance is not measured: %s", error)
        return None


@torch.no_grad()
def reconstruction_report(
    autoencoder: Autoencoder, held_out: Batch, num_images: int, distance: PerceptualDistance | None = None
) -> tuple[dict[str, float], Image.Image]:
    """Return measures of held-out images or clips, and a sheet: originals over reconstructions.

    PSNR (dB), SSIM and perceptual distance, means over images or frames; the flicker of clips; and what the bottleneck
    measures of its use.
    """
    if held_out.pixel_values is None:
        raise ValueError("reconstructions are measured on images, got cached latents")
    originals = time_last(held_out.pixel_values)
    rebuilt = reconstruct(autoencoder, originals)
    true, made = (time_first(one).flatten(0, -4) for one in (originals, rebuilt))
    metrics = {"validation/psnr": float(psnr(made, true).mean()), "validation/ssim": float(ssim(made, true).mean())}
    if originals.ndim == 5:
        metrics["validation/flicker"] = float(flicker(rebuilt, originals).mean())
    for name, value in bottleneck_of(autoencoder).measures(autoencoder, torch.split(originals, CHUNK)).items():
        metrics[f"validation/{name}"] = value
    if distance is not None:
        pairs = zip(torch.split(made, CHUNK), torch.split(true, CHUNK), strict=True)
        metrics["validation/perceptual"] = float(torch.cat([distance(*pair) for pair in pairs]).mean())
    return metrics, reconstruction_sheet(originals[:num_images], rebuilt[:num_images])


def reconstruction_sheet(originals: Tensor, rebuilt: Tensor) -> Image.Image:
    """Return a sheet of images, originals over reconstructions; of clips, the frames of each under one another."""
    clips = (one if one.ndim == 5 else one[:, :, None] for one in (originals, rebuilt))
    rows = [to_uint8(frames) for one in clips for frames in one.unbind(2)]
    return image_grid(torch.cat(rows).numpy(), len(originals))


def rehearse_saving(autoencoder: Autoencoder, pixel_values: Tensor, where: str) -> None:
    """Do with a few images what validation and saving do; raises ConfigError, which names `where`, if that fails."""
    with explained(f"{where} do not fit together"):
        rebuilt = reconstruct(autoencoder, time_last(pixel_values))
        ssim(*(time_first(one).flatten(0, -4) for one in (rebuilt, time_last(pixel_values))))
        channels = bottleneck_of(autoencoder).channels(autoencoder)
        ones = torch.ones(channels, device=next(autoencoder.parameters()).device)
        fold_statistics(copy.deepcopy(autoencoder), 0 * ones, ones)


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, train: PositionDataset, count: int = 4096) -> tuple[Tensor, Tensor]:
    """Return mean and std, (C,), of latents sampled for up to `count` training images, posterior spread included."""
    device = next(autoencoder.parameters()).device
    pixel_values = fixed_batch(train, count).pixel_values
    if pixel_values is None:
        raise ValueError("latent statistics are measured on images, got cached latents")
    scale = autoencoder.config.scaling_factor  # of a pretrained one, say: the statistics are those without it
    parts = [posterior_moments(autoencoder, part.to(device)) for part in torch.split(pixel_values, CHUNK)]
    means = torch.cat([mean for mean, _ in parts]).double() / scale
    variances = (torch.cat([std for _, std in parts]).double() / scale).square()
    over = (0, 2, 3)
    return means.mean(over).float(), (means.var(over) + variances.mean(over)).sqrt().float()


def save_at_unit_scale(autoencoder: Autoencoder, train: PositionDataset, dtype: torch.dtype, folder: Path) -> None:
    """Save a copy whose latents of the training images have mean 0 and std 1; `autoencoder` stays as it is.

    The latents of a frozen encoder, one with temporal layers in the decoder, are saved as they are.
    """
    finished = copy.deepcopy(autoencoder)
    if not isinstance(finished, VideoAutoencoder):
        fold_statistics(finished, *latent_statistics(finished, train))
    if "_name_or_path" in finished.config:
        finished.register_to_config(_name_or_path="")  # the folder that it was once loaded from, on this machine
    torch.nn.Module.to(finished, dtype)  # the class's own `to` warns of what it keeps in float32: nothing
    finished.save_pretrained(folder)
