"""The pipeline that a stage is drawn with, and saved as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ldm.conditioners.text import KEYWORDS, TextConditioner
from ldm.config import StageConfig
from ldm.models.scheduler import build_scheduler
from ldm.spaces import LatentSpace, PixelSpace
from ldm.training.steps import DiffusionStep

LATENT = {
    "UNet2DConditionModel": ("unet", KEYWORDS),
    "PixArtTransformer2DModel": ("transformer", {**KEYWORDS, "encoder_attention_mask": "attention_mask"}),
}
"""What diffusers' pipelines call the denoiser of latents, and what they tell it of the text."""


def export(step: DiffusionStep, config: StageConfig, pipelines: Mapping[str, Callable[..., Any]]) -> Any:
    """Return the pipeline of a stage, of its averaged weights as they stand, and with no progress bar of its own.

    pipelines: their classes by that of the denoiser. They are not of this package, because they travel without it.

    Raises:
        ValueError: no pipeline can tell the denoiser all that it is told, or works in its space.

    """
    space, model, told = step.stage.space, step.averaged, list(step.averaged.conditioners)
    scheduler = build_scheduler(config.objective, config.sampler, clip_sample=isinstance(space, PixelSpace))
    text = model.conditioners["text"] if told == ["text"] else None
    kind = type(model.denoiser).__name__
    name, keywords = LATENT.get(kind, ("", {}))
    pipeline: Any
    if isinstance(space, LatentSpace) and isinstance(text, TextConditioner) and text.keywords == keywords:
        parts = {"vae": space.autoencoder, "text_encoder": text.text_encoder, "tokenizer": text.tokenizer}
        pipeline = pipelines[kind](**parts, **{name: model.denoiser}, scheduler=scheduler)
    elif isinstance(space, PixelSpace) and kind == "UNet2DModel" and told in ([], ["label"]):
        pipeline = pipelines[kind](unet=model.denoiser, scheduler=scheduler)
    else:
        raise ValueError(
            f"no pipeline draws with a {kind} in space.kind {config.space.kind} that is told "
            f"{', '.join(told) or 'nothing'}; expected space.kind latent with conditioners.text, no other conditioner "
            f"and conditioners.text.keywords {keywords or KEYWORDS}, or space.kind pixel with a UNet2DModel and at "
            "most conditioners.label"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
