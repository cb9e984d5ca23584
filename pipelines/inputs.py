"""The inputs of a pipeline's call: checked, and brought into one form."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

logger = logging.getLogger(__name__)
MAX_PIXELS = 2**24
"""Most pixels of one image. The memory of decoding grows with them, that of attention with their square."""

MAX_IMAGES = 4096
"""Most images of one call."""
MAX_GUIDANCE = 1e6
MAX_LATENT = 1e6
"""Largest absolute value in latents and embeddings; the denoiser squares its inputs, and float32 ends at 3e38."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Limits:
    """The limits of a pipeline's components."""

    factor: int
    """Pixels of one latent, in height and width."""
    patch: int
    """Latents of one patch of the denoiser, in height and width."""
    default_size: tuple[int, int]
    """Default height and width in pixels: those of a given image, else the model's."""
    latent_channels: int
    inference_steps: tuple[int, int]
    """Smallest and largest number of steps."""
    prompt_length: int | None
    """Tokens of a prompt, padding included; None without a tokenizer."""
    embed_width: int | None
    """Width of the prompt embeddings that the denoiser takes; None if it differs by layer."""
    callback_tensors: tuple[str, ...]


@dataclass(frozen=True)
class CallInputs:
    """The checked inputs of a call."""

    prompt: list[str] | None
    """None: `prompt_embeds` are given."""
    negative_prompt: list[str] | None
    """One for each prompt; None: not given."""
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    num_inference_steps: int
    num_images_per_prompt: int
    generator: torch.Generator | list[torch.Generator] | None
    """A list has one for each image."""
    latents: torch.Tensor | None
    latents_shape: tuple[int, ...]
    """Images, channels, height, width; of clips: clips, channels, frames, height, width."""
    callback_on_step_end_tensor_inputs: Sequence[str]


def check_inputs(
    limits: Limits,
    *,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    height: int | None,
    width: int | None,
    num_inference_steps: int,
    guidance_scale: float,
    num_images_per_prompt: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: torch.Tensor | None,
    output_type: str,
    return_dict: bool,
    callback_on_step_end: object,
    callback_on_step_end_tensor_inputs: Sequence[str],
    num_frames: int | None = None,
) -> CallInputs:
    """Return the call's inputs in one form; ValueError if one is unusable, with the given and the allowed values.

    num_frames: of each clip; None: images are sampled.
    """
    prompts = None if prompt is None else texts("prompt", prompt)
    if (prompts is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds, and not both")
    _check_embeds("prompt_embeds", prompt_embeds, (None, None, limits.embed_width))
    count = len(prompts) if prompts is not None else len(prompt_embeds)  # type: ignore[arg-type]
    length = limits.prompt_length if prompt_embeds is None else prompt_embeds.shape[1]
    _check_embeds("negative_prompt_embeds", negative_prompt_embeds, (count, length, limits.embed_width))
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
    whole_number("num_inference_steps", num_inference_steps, *limits.inference_steps)
    check_guidance(guidance_scale)
    whole_number("num_images_per_prompt", num_images_per_prompt, 1, None)
    if count * num_images_per_prompt > MAX_IMAGES:
        raise ValueError(
            f"num_images_per_prompt: got {shown(num_images_per_prompt)} for {count} prompts; expected at most "
            f"{MAX_IMAGES} images in a call"
        )
    check_output(output_type, return_dict)
    check_callback(callback_on_step_end)
    _check_tensors(limits, callback_on_step_end_tensor_inputs)
    whose = "the autoencoder's factor {}"
    if limits.patch > 1:
        whose = "{}, the autoencoder's factor times the denoiser's patch"
    rows, columns = checked_size(height, width, limits.default_size, limits.factor * limits.patch, whose)
    latent_size = rows // limits.factor, columns // limits.factor
    frames: tuple[int, ...] = ()
    axes = "images, channels, height, width"
    if num_frames is not None:
        whole_number("num_frames", num_frames, 1, MAX_IMAGES // (count * num_images_per_prompt))
        axes, frames = "clips, channels, frames, height, width", (num_frames,)
    shape = (count * num_images_per_prompt, limits.latent_channels, *frames, *latent_size)
    if latents is not None and (not torch.is_tensor(latents) or tuple(latents.shape) != shape):
        came = tuple(latents.shape) if torch.is_tensor(latents) else type(latents).__name__
        raise ValueError(f"latents: got {came}; expected a tensor of shape {shape} ({axes})")
    _check_values("latents", latents)
    return CallInputs(
        prompt=prompts,
        negative_prompt=_negatives(negative_prompt, count),
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        num_inference_steps=num_inference_steps,
        num_images_per_prompt=num_images_per_prompt,
        generator=check_generators(generator, shape[0]),
        latents=latents,
        latents_shape=shape,
        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
    )


def texts(name: str, value: str | Sequence[str] | None) -> list[str]:
    """Return `value`, a string or a list or tuple of strings, as a list; ValueError for anything else."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}: got {type(value).__name__}; expected a string, or a list or tuple of strings")
    if not value:
        raise ValueError(f"{name}: empty batch; expected at least one string")
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"{name}: item {index} is {type(text).__name__}; expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: item {index} is not valid Unicode: lone surrogate {text[error.start]!a} at character "
                f"{error.start}; decode it with errors='replace'"
            ) from None
    return list(value)


def whole_number(name: str, value: int, low: int, high: int | None) -> None:
    """Raise ValueError if `value` is not a whole number from `low` to `high` (None: no upper bound)."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        allowed = f"from {low} to {high}" if high is not None else f">= {low}"
        raise ValueError(f"{name}: got {shown(value)}; expected a whole number {allowed}")


def shown(value: object) -> str:
    """Return the `repr` of a value, cut to 80 characters; the name of its type if `repr` fails."""
    try:
        return repr(value)[:80]
    except ValueError:  # a whole number of more than 4300 digits
        return type(value).__name__


def check_guidance(guidance_scale: float) -> None:
    """Raise ValueError if `guidance_scale` is not a number from 0 to `MAX_GUIDANCE`."""
    if not isinstance(guidance_scale, Real) or not 0 <= guidance_scale <= MAX_GUIDANCE:
        raise ValueError(
            f"guidance_scale: got {shown(guidance_scale)}; expected a finite number >= 0 and at most {MAX_GUIDANCE:g} "
            "(<= 1: no guidance)"
        )


def check_options(guidance_rescale: float, cross_attention_kwargs: Any = None, clip_skip: int | None = None) -> None:
    """Raise ValueError if one of these options is unusable for every pipeline."""
    if not isinstance(guidance_rescale, Real) or not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale: got {shown(guidance_rescale)}; expected a number from 0 (none) to 1")
    named = isinstance(cross_attention_kwargs, dict) and all(isinstance(key, str) for key in cross_attention_kwargs)
    if cross_attention_kwargs is not None and not named:
        raise ValueError(f"cross_attention_kwargs: got {shown(cross_attention_kwargs)}; expected a dict of names")
    if named and not isinstance(scale := cross_attention_kwargs.get("scale", 1.0), Real):
        raise ValueError(f"cross_attention_kwargs: got scale {shown(scale)}; expected a number")
    if clip_skip is not None:
        whole_number("clip_skip", clip_skip, 0, None)


def check_output(output_type: object, return_dict: object) -> None:
    """Raise ValueError if `output_type` or `return_dict` is not one of the allowed values."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: got {shown(output_type)}; expected one of {', '.join(OUTPUT_TYPES)}")
    if not isinstance(return_dict, bool):
        raise ValueError(f"return_dict: got {shown(return_dict)}; expected True or False")


def _check_values(name: str, tensor: torch.Tensor | None) -> None:
    if tensor is None:
        return
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{name}: got {tensor.dtype}, {tensor.layout} on {tensor.device}; expected dense floats")
    if not float(tensor.abs().max()) <= MAX_LATENT:  # false for NaN; a float, since MAX_LATENT is infinity in float16
        raise ValueError(f"{name}: has values that are NaN, infinite or beyond {MAX_LATENT:g}")


def check_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, images: int
) -> torch.Generator | list[torch.Generator] | None:
    """Return the generator, or the list of one for each of `images`; ValueError for anything else."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(
            f"generator: got {type(generator).__name__}; expected torch.Generator().manual_seed(SEED) or a list of them"
        )
    if len(generator) != images:
        raise ValueError(f"generator: got a list of {len(generator)} for {images} images; expected one an image")
    return list(generator)


@contextmanager
def same_noise(
    generator: torch.Generator | Sequence[torch.Generator] | None, images: int
) -> Iterator[list[torch.Generator]]:
    """Give a generator for each of `images`, all of the state of the one given, which goes on from there."""
    given = check_generators(generator, 1) or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    one = given[0] if isinstance(given, list) else given
    copies = [one.clone_state() for _ in range(images)]
    yield copies
    one.set_state(copies[0].get_state())


def check_callback(callback: object) -> None:
    """Raise ValueError if `callback` is neither a function nor None."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end: got {shown(callback)}; expected a function")


def _check_tensors(limits: Limits, tensors: Sequence[str]) -> None:
    several = isinstance(tensors, list | tuple)
    unknown = (
        [name for name in tensors if not isinstance(name, str) or name not in limits.callback_tensors]
        if several
        else tensors
    )
    if not several or unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: got {shown(unknown)}; expected some of "
            f"{', '.join(limits.callback_tensors)}, in a list"
        )


def checked_size(
    height: int | None, width: int | None, default: tuple[int, int], multiple: int, whose: str
) -> tuple[int, int]:
    """Return height and width of an image in pixels, `default` for None; ValueError if they are unusable.

    Both must be a multiple of `multiple`. whose: names this number in the error, with ``{}`` for the number.
    """
    size = (default[0] if height is None else height, default[1] if width is None else width)
    for name, value in zip(("height", "width"), size, strict=True):
        whole_number(name, value, multiple, None)
        if value % multiple:
            below = value // multiple * multiple
            raise ValueError(
                f"{name}: {shown(value)} pixels is not a multiple of {whose.format(multiple)}; "
                f"{shown(below)} and {shown(below + multiple)} are"
            )
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"height * width: got {shown(size[0])} * {shown(size[1])} pixels; expected at most {MAX_PIXELS}"
        )
    return size


def _check_embeds(name: str, embeds: torch.Tensor | None, expected: tuple[int | None, int | None, int | None]) -> None:
    if embeds is None:
        return
    if not torch.is_tensor(embeds) or embeds.ndim != 3 or not embeds.numel():
        came = tuple(embeds.shape) if torch.is_tensor(embeds) else type(embeds).__name__
        raise ValueError(f"{name}: got {came}; expected a tensor of shape (prompts, tokens, width)")
    prompts, tokens, width = expected
    if width not in (None, embeds.shape[2]):
        raise ValueError(
            f"{name} has width {embeds.shape[2]}, the denoiser expects {width}: was it made by another text encoder?"
        )
    if prompts not in (None, embeds.shape[0]) or tokens not in (None, embeds.shape[1]):
        raise ValueError(f"{name}: got {tuple(embeds.shape)}; expected {prompts} prompts of {tokens} tokens")
    _check_values(name, embeds)


def _negatives(negative_prompt: str | Sequence[str] | None, count: int) -> list[str] | None:
    if negative_prompt is None:
        return None
    negatives = texts("negative_prompt", negative_prompt)
    if isinstance(negative_prompt, str):
        return negatives * count
    if len(negatives) != count:
        raise ValueError(f"negative_prompt: got {len(negatives)} for {count} prompts; expected one, or one a prompt")
    return negatives
