"""The pipeline that a stage is drawn with, and saved as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import UNet2DModel

from ldm.conditioners.text import KEYWORDS, TextConditioner
from ldm.config import StageConfig
from ldm.models.scheduler import build_scheduler
from ldm.spaces import LatentSpace, PixelSpace
from ldm.training.steps import DiffusionStep


def export(
    step: DiffusionStep, config: StageConfig, text_to_image: Callable[..., Any], of_pixels: Callable[..., Any]
) -> Any:
    """Return the pipeline of a stage, of its averaged weights as they stand, and with no progress bar of its own.

    text_to_image, of_pixels: the classes, of ``pipelines``, which are not of this package: they travel without it.

    Raises:
        ValueError: no pipeline can tell the denoiser all that it is told, or works in its space.

    """
    space, model, told = step.stage.space, step.averaged, list(step.averaged.conditioners)
    scheduler = build_scheduler(config.objective, config.sampler, clip_sample=isinstance(space, PixelSpace))
    text = model.conditioners["text"] if told == ["text"] else None
    pipeline: Any
    if isinstance(space, LatentSpace) and isinstance(text, TextConditioner) and text.keywords == KEYWORDS:
        pipeline = text_to_image(
            vae=space.autoencoder,
            text_encoder=text.text_encoder,
            tokenizer=text.tokenizer,
            unet=model.denoiser,
            scheduler=scheduler,
        )
    elif isinstance(space, PixelSpace) and isinstance(model.denoiser, UNet2DModel) and told in ([], ["label"]):
        pipeline = of_pixels(unet=model.denoiser, scheduler=scheduler)
    else:
        raise ValueError(
            f"no pipeline draws with a {type(model.denoiser).__name__} in space.kind {config.space.kind} that is told "
            f"{', '.join(told) or 'nothing'}; expected space.kind latent with conditioners.text, no other conditioner "
            "and no other conditioners.text.keywords, or space.kind pixel with a UNet2DModel and at most "
            "conditioners.label"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
