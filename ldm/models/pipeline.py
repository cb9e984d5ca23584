"""Pipelines to sample with, ours or stock, from a folder or the Hub."""

from __future__ import annotations

import inspect
import logging
import math
from pathlib import Path
from typing import Any

from accelerate import PartialState
from diffusers import DiffusionPipeline

from ldm.config.check import shown
from ldm.errors import explained
from ldm.models.autoencoder import downsampling_factor
from ldm.models.foreign import checked_pipeline
from ldm.models.quiet import quietly

log = logging.getLogger(__name__)
SETTINGS = ("num_inference_steps", "guidance_scale")
"""The last words of the names of a call's settings, in a pipeline's config."""


@quietly()
def load_pipeline(model: str, trust_remote_code: bool) -> Any:
    """Return the pipeline in folder or Hub repository `model`, ``user/name`` or ``user/name@revision``.

    It is of the stock class in ``model_index.json``, or with `trust_remote_code` of the class in the folder's own
    ``pipeline.py``: this runs code that came with the model.

    Raises:
        ValueError: as `checked_pipeline`; or there is no such folder, and no such repository was found.

    """
    own: dict[str, Any] = {}
    try:
        name, revision = checked_pipeline(model, trust_remote_code)
        if trust_remote_code:
            own = {"custom_pipeline": name, "trust_remote_code": True, "custom_revision": revision.get("revision")}
        with explained(model):
            pipeline = DiffusionPipeline.from_pretrained(
                name, use_safetensors=True, low_cpu_mem_usage=False, **revision, **own
            )
    except OSError as error:
        if (Path(model) / "model_index.json").exists():
            raise
        raise ValueError(f"{model}: no folder of a pipeline, and the Hub gave none: {error}") from error
    pipeline.set_progress_bar_config(leave=False)
    if not own and (said := _settings_passed_over(name, revision)):
        log.warning(
            "%s was validated with %s, which %s does not read: say so in the call, or load the folder's own pipeline, "
            "--trust_remote_code true",
            model,
            said,
            type(pipeline).__name__,
        )
    return pipeline.to(PartialState().device)


def _settings_passed_over(name: str, revision: dict[str, Any]) -> str:
    """Return the settings of a call that a folder holds for its own pipeline alone, as a text."""
    index = DiffusionPipeline.load_config(name, **revision)
    found = {key.removeprefix("_"): value for key, value in index.items() if key.startswith("_")}
    return ", ".join(f"{key} {value}" for key, value in found.items() if key.endswith(SETTINGS))


@quietly()
def starting_from(pipeline: Any, masked: bool) -> Any:
    """Return a pipeline of the same parts that takes an ``image``, and a ``mask_image`` if `masked`.

    Our pipelines take both themselves; for a stock pipeline diffusers has a second class.

    Raises:
        ValueError: diffusers has no such class for this pipeline.

    """
    if {"image", "strength"} <= set(inspect.signature(pipeline.__call__).parameters):
        return pipeline
    # imported here: they import every pipeline of diffusers, which takes a second
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    kind = AutoPipelineForInpainting if masked else AutoPipelineForImage2Image
    channels = pipeline.unet.config.in_channels if hasattr(pipeline, "unet") else None
    try:
        if masked and channels not in (None, 4, 9):
            raise ValueError(f"diffusers inpaints latents of 4 channels, these have {channels}")
        return kind.from_pipe(pipeline)
    except ValueError as error:
        name, how = type(pipeline).__name__, " with a mask" if masked else ""
        raise ValueError(
            f"{name} starts from no image{how}, and diffusers has no other pipeline of its parts that does; if the "
            "model is one of ours, load its own pipeline, --trust_remote_code true"
        ) from error


def size_arguments(pipeline: Any, width: int, height: int) -> dict[str, int]:
    """Return the height and width of a call for which a given image keeps its size, rounded down to whole latents.

    Without them, stock inpainting pipelines resize the image to a square of the model's size. Empty if the pipeline
    takes no image or no size.
    """
    factor, takes = getattr(pipeline, "vae_scale_factor", None), inspect.signature(pipeline.__call__).parameters
    if factor is None or not {"image", "height", "width"} <= set(takes):
        return {}
    denoiser = pipeline.components.get("transformer")
    multiple = factor * (denoiser.config.patch_size if denoiser is not None else 1)
    return {"height": height // multiple * multiple, "width": width // multiple * multiple}


MAX_TOKENS = 10_000
"""Largest ``model_max_length`` that is taken for a real one; tokenizers without a limit have 1e30."""


def plain_call(pipeline: Any) -> dict[str, Any]:
    """Return the arguments of a call with which captions and sizes are handled as in training.

    By default, PixArt's stock pipeline samples only sizes of its own list, and cuts captions at another length, and
    Kandinsky's has a size of its own.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    plain: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
    length = getattr(getattr(pipeline, "tokenizer", None), "model_max_length", None)
    if length is not None and length <= MAX_TOKENS and "use_resolution_binning" in takes:
        plain["max_sequence_length"] = length
    if "movq" in getattr(pipeline, "components", ()):
        plain |= dict.fromkeys(("height", "width"), image_size(pipeline))
    return {name: value for name, value in plain.items() if name in takes}


DEFAULT_GUIDANCE = 3.0


def call_settings(pipeline: Any, num_inference_steps: int, guidance_scale: float | None) -> dict[str, Any]:
    """Return the sampling arguments of a pipeline's call.

    A `guidance_scale` of None is `DEFAULT_GUIDANCE`, or the pipeline's own if its config has one.

    Raises:
        ValueError: one is out of range; or a guidance scale is given and the pipeline has no guidance.

    """
    most = pipeline.scheduler.config.num_train_timesteps
    if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= most:
        raise ValueError(
            f"num_inference_steps: got {shown(num_inference_steps)}; expected a whole number from 1 to {most}"
        )
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale: got {shown(guidance_scale)}; expected a finite number, 0 or more")
    guided = "guidance_scale" in inspect.signature(pipeline.__call__).parameters
    if not guided and guidance_scale not in (None, 1):
        raise ValueError(f"guidance_scale: got {guidance_scale}; {type(pipeline).__name__} has none; leave it out")
    own = guided and inspect.signature(pipeline.__call__).parameters["guidance_scale"].default is None
    if guidance_scale is None and not own:
        guidance_scale = DEFAULT_GUIDANCE
    steps = {"num_inference_steps": num_inference_steps}
    return steps | ({"guidance_scale": guidance_scale} if guided and guidance_scale is not None else {})


def own_settings(pipeline: Any) -> dict[str, Any]:
    """Return the settings of a call that are in a pipeline's config, for what the call does not say."""
    return {name: value for name, value in pipeline.config.items() if name.endswith(SETTINGS)}


def image_size(pipeline: Any) -> int:
    """Return the size in pixels, height and width, of the images that a pipeline samples by default.

    Raises:
        ValueError: its denoiser has no ``sample_size``.

    """
    if (size := getattr(pipeline, "image_size", None)) is not None:  # several stages have several sizes
        return int(size)
    parts = pipeline.components
    denoiser = parts.get("unet") or parts.get("transformer")
    size = denoiser.config.get("sample_size") if denoiser is not None else None
    if size is None:
        raise ValueError(
            f"{type(pipeline).__name__} does not sample images with a unet or transformer of a known sample_size; "
            "expected a pipeline that does"
        )
    pixels: int = size if isinstance(size, int) else size[0]
    autoencoder = parts.get("vae") or parts.get("vqvae") or parts.get("movq")
    return pixels if autoencoder is None else pixels * downsampling_factor(autoencoder)
