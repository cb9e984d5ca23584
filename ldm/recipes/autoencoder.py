"""The recipe of an autoencoder: trained on reconstruction losses, saved so that its latents have unit scale."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ldm.config import AutoencoderConfig
from ldm.config.places import pretrained_place
from ldm.data.batches import Batch, CaptionedImages, PositionDataset, fixed_batch
from ldm.doctor.examination import autoencoder_findings
from ldm.errors import ConfigError
from ldm.evaluation.leaks import refuse_leaks
from ldm.export.card import CardText
from ldm.models.network import AUTOENCODERS, OWN, build_network, with_temporal_decoder
from ldm.models.temporal import VideoAutoencoder
from ldm.recipes.recipe import Recipe
from ldm.training.autoencoding import measuring_distance, reconstruction_report, rehearse_saving, save_at_unit_scale
from ldm.training.loop import Event, Loop
from ldm.training.rehearsal import first_batch, rehearse
from ldm.training.run import Run
from ldm.training.steps import AutoencoderStep

log = logging.getLogger(__name__)
FIELDS = "autoencoder, reconstruction"
"""Parts of the config that must fit together."""
LOADING = """\
```python
import torch
from {module} import {name}

model = "model"
vae = {name}.from_pretrained(model)
images = torch.zeros(1, 3, {size}, {size})  # in [-1, 1]
latents = {encode}
reconstructions = {decode}.sample
```
"""
CALLS = {
    "AutoencoderKL": ("vae.encode(images).latent_dist.mode()", "vae.decode(latents)"),
    "VQModel": ("vae.encode(images).latents", "vae.decode(latents, force_not_quantize=True)"),
    "VideoAutoencoder": ("vae.encode(images).latent_dist.mode()", "vae.decode(latents)"),
}
"""Encoding and decoding without chance, by class."""
ABOUT = """\
An autoencoder of images, for latent diffusion. Its latents have mean 0 and standard deviation 1, and its \
`scaling_factor` is 1."""
ABOUT_CLIPS = """\
An autoencoder for latent diffusion, whose decoder has temporal layers: it decodes clips, (B, C, F, h, w), without the \
flicker of frames that are decoded one by one. Its encoder, and so its latents, are those of the autoencoder of images \
that it was made of."""
MEASURED = """\
reconstructions, from the latents' mean, of validation images, at most {loss_images}, none of them trained
on."""


def autoencoder_recipe(config: AutoencoderConfig, run: Run, images: CaptionedImages) -> Recipe:
    """Return the recipe of an autoencoder; ConfigError if a pretrained one was trained on images held out here."""
    place = pretrained_place(config.autoencoder)
    parts = [] if place is None else [place]
    refuse_leaks(parts, images)
    torch.manual_seed(config.seed)
    autoencoder = build_network(config.autoencoder, "autoencoder", AUTOENCODERS)
    if config.temporal is not None:
        autoencoder = with_temporal_decoder(autoencoder, config.temporal)
    elif isinstance(autoencoder, VideoAutoencoder):
        raise ConfigError("temporal: got null for a VideoAutoencoder; expected settings, {} at least")
    step = AutoencoderStep(autoencoder, config.reconstruction, run, config.optim.ema_decay)
    train = PositionDataset(images, "train", config.seed)
    held_out = fixed_batch(PositionDataset(images, "validation", config.seed), config.validation.loss_images)
    distance = measuring_distance(config.data.image_size)

    def rehearse_all() -> None:
        batch = first_batch(images, 2)
        where = f"{FIELDS}, data.image_size {config.data.image_size}"
        rehearse(step, batch, where, config.reconstruction.discriminator_start_step)
        step.forget()
        rehearse_saving(step.averaged, cast(Tensor, batch.pixel_values), where)

    def validate(global_step: int) -> None:
        metrics, sheet = reconstruction_report(step.averaged, held_out, config.validation.num_images, distance)
        run.log_metrics(metrics, global_step)
        said = [f"{name.removeprefix('validation/')} {value:.3g}" for name, value in metrics.items()]
        log.info("step %d: held-out %s", global_step, ", ".join(said))
        run.log_image("reconstructions", sheet, global_step)

    def events(loop: Loop[Batch]) -> Sequence[Event]:
        return ((config.loop.validate_every_steps, validate),)

    def save(folder: Path) -> None:
        save_at_unit_scale(step.averaged, train, getattr(torch, config.save_dtype), folder)

    return Recipe(
        step=step,
        parts=parts,
        rehearse=rehearse_all,
        dataset=lambda: train,
        events=events,
        alarms=lambda dataset: (),
        findings=partial(autoencoder_findings, config, step, validate),
        save=save,
        card=autoencoder_card(config, type(autoencoder).__name__),
    )


def autoencoder_card(config: AutoencoderConfig, name: str = "AutoencoderKL") -> CardText:
    """Return the card texts of an autoencoder of the class `name`."""
    encode, decode = CALLS[name]
    return CardText(
        title="Autoencoder",
        about=ABOUT_CLIPS if config.temporal is not None else ABOUT,
        sheet="![validation images, which were not trained on, over their reconstructions](samples.png)",
        sheets="reconstructions",
        loading=LOADING.format(
            module=OWN[name].__module__ if name in OWN else "diffusers",
            name=name,
            size=config.data.image_size,
            encode=encode,
            decode=decode,
        ),
        measured=MEASURED.format(loss_images=config.validation.loss_images),
        notes={},
        task="image-to-image",
        pipeline_tag=None,
        tags=("autoencoder", "latent-diffusion"),
    )
