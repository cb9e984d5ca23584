"""One stage of a cascade: its parts checked, prompts and images of a call as tensors, and what the call returns."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput

from .image import RGB, given_images
from .inputs import check_callback, check_guidance, shown, texts, whole_number
from .prompts import encode, tokenized
from .sampling import StepCallback
from .schedulers import check_scheduler

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and std of the images that a CLIP takes (Radford et al. 2021)."""
NOISE_LEVEL = 100
"""Timestep, of 1000, of the noise on small images in a call that names none."""


class TextEmbeds(NamedTuple):
    """The outputs of a CLIP's text encoder with projection."""

    states: torch.Tensor
    """The last hidden states, (B, L, D)."""
    pooled: torch.Tensor
    """The text embeddings, (B, D)."""
    mask: torch.Tensor
    """True for tokens, False for padding, (B, L)."""

    def repeated(self, times: int) -> "TextEmbeds":
        """Return each text `times` times in a row."""
        return TextEmbeds(*(tensor.repeat_interleave(times, 0) for tensor in self))

    def rows(self, count: int) -> "TextEmbeds":
        """Return `count` texts: these, or the only one so many times."""
        return TextEmbeds(*(rows_of(tensor, count) for tensor in self))


def text_embeds(name: str, prompts: Sequence[str], pipeline: Any) -> TextEmbeds:
    """Return the embeddings of prompts; longer ones are cut, with a warning. `name` is that of the argument."""
    tokenizer, text_encoder, device = pipeline.tokenizer, pipeline.text_encoder, pipeline._execution_device
    tokens = tokenized(name, list(prompts), tokenizer, text_encoder, tokenizer.model_max_length)
    output = text_encoder(tokens.input_ids.to(device))
    return TextEmbeds(output.last_hidden_state, output.text_embeds, tokens.attention_mask.to(device).bool())


def image_embeds(images: torch.Tensor, image_encoder: Any, device: torch.device) -> torch.Tensor:
    """Return the embeddings, (B, D) float32, of images (B, 3, H, W) in [0, 1] of any size."""
    size = image_encoder.config.image_size
    images = images.to(device, torch.float32)
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    found: torch.Tensor = image_encoder(((images - mean) / std).to(image_encoder.dtype)).image_embeds
    return found.float()


def null_image_embeds(pipeline: Any, width: int) -> torch.Tensor:
    """Return the embedding (1, D) of no image: zeros (Ramesh et al. 2022), or that of a zero image (Kandinsky 2.2)."""
    null, encoder = pipeline.config.null_image_embeds, pipeline.image_encoder
    if null == "zeros":
        return torch.zeros(1, width, device=pipeline._execution_device)
    if null != "zero_picture" or encoder is None:
        raise ValueError(f"null_image_embeds: got {null!r}; expected 'zeros', or 'zero_picture' with an image encoder")
    return zero_image_embeds(encoder, pipeline._execution_device)


def zero_image_embeds(image_encoder: Any, device: torch.device) -> torch.Tensor:
    """Return the embedding (1, D), float32, of an image that is zero everywhere once normalised."""
    if image_encoder is None:
        raise ValueError("image_encoder: the pipeline has none, and guides with the embedding of a zero image")
    size = image_encoder.config.image_size
    images = torch.zeros(1, 3, size, size, device=device, dtype=image_encoder.dtype)
    found: torch.Tensor = image_encoder(images).image_embeds
    return found.float()


def given_latents(latents: Any, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the unit noise of a call for the decoder; ValueError if it is not finite and of this shape."""
    if not torch.is_tensor(latents) or tuple(latents.shape) != shape:
        came = tuple(latents.shape) if torch.is_tensor(latents) else type(latents).__name__
        raise ValueError(f"decoder_latents: got {came}; expected a tensor {shape} (images, channels, height, width)")
    if not latents.isfinite().all():
        raise ValueError("decoder_latents: NaN or infinity; expected finite numbers")
    return latents.to(device, torch.float32)


def given_embeds(
    pipeline: Any, image: Any, embeds: Any, null: torch.Tensor, name: str = "image_embeds"
) -> torch.Tensor:
    """Return the image embeddings, (B, D), of a call's `image` or `image_embeds`; `null`, (1, D), without either.

    name: of the argument that the embeddings came in.
    """
    if image is not None and embeds is not None:
        raise ValueError("image_embeds: given together with image; give one of them")
    if image is not None:
        if pipeline.image_encoder is None:
            raise ValueError("image: the pipeline has no image encoder; give image_embeds")
        return image_embeds(as_tensor("image", image), pipeline.image_encoder, null.device)
    if embeds is None:
        return null
    if not torch.is_tensor(embeds) or embeds.ndim != 2 or embeds.shape[1] != null.shape[1] or not len(embeds):
        came = tuple(embeds.shape) if torch.is_tensor(embeds) else type(embeds).__name__
        raise ValueError(f"{name}: got {came}; expected a tensor (B, {null.shape[1]})")
    if not embeds.isfinite().all():
        raise ValueError(f"{name}: NaN or infinity; expected finite numbers")
    return embeds.to(null)


def as_tensor(name: str, image: Any) -> torch.Tensor:
    """Return the images in an argument of a call as (B, 3, H, W) in [0, 1]; PIL images must be of one size."""
    images = given_images(name, image, RGB, "white")
    if torch.is_tensor(images):
        return images
    if len({one.size for one in images}) > 1:
        raise ValueError(f"{name}: got images of the sizes {sorted({one.size for one in images})}; expected one size")
    arrays = [torch.from_numpy(np.array(one.convert("RGB"))) for one in images]
    return torch.stack(arrays).permute(0, 3, 1, 2).float() / 255


def small_images(image: Any, size: int | None) -> torch.Tensor:
    """Return the images in an argument of a call at `size` x `size` pixels, in [-1, 1]; None: as they are."""
    images = 2 * as_tensor("image", image) - 1
    if size is None or images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def check_prior(prior: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Raise ValueError if a prior does not read this text encoder's outputs for as many tokens."""
    if prior is None or text_encoder is None or tokenizer is None:
        return
    width, states = text_encoder.config.projection_dim, text_encoder.config.hidden_size
    if {width, states} != {prior.config.embedding_dim}:
        raise ValueError(
            f"prior: reads and predicts embeddings of width {prior.config.embedding_dim}; the text encoder has states "
            f"of width {states} and embeddings of width {width}: all three must be equal"
        )
    if tokenizer.model_max_length != prior.config.num_embeddings:
        raise ValueError(
            f"prior: reads {prior.config.num_embeddings} tokens, and the tokenizer makes {tokenizer.model_max_length}"
        )


def check_decoder(name: str, unet: Any, image_encoder: Any, text_encoder: Any) -> None:
    """Raise ValueError if a decoder, the component `name`, is not conditioned on the outputs of these encoders."""
    if unet is None:
        return
    config = unet.config
    if config.encoder_hid_dim_type != "text_image_proj" or config.addition_embed_type != "text_image":
        raise ValueError(
            f"{name}: is conditioned on no image embeddings; build it with addition_embed_type: text_image and "
            "encoder_hid_dim_type: text_image_proj"
        )
    # diffusers: embeddings of images and texts are as wide as cross_attention_dim, states as encoder_hid_dim
    widths = [(image_encoder, "projection_dim", "embeddings", config.cross_attention_dim)]
    widths += [(text_encoder, "projection_dim", "embeddings", config.cross_attention_dim)]
    widths += [(text_encoder, "hidden_size", "states", config.encoder_hid_dim)]
    for encoder, key, noun, wanted in widths:
        if encoder is not None and (found := getattr(encoder.config, key)) != wanted:
            raise ValueError(
                f"{name}: takes {noun} of width {wanted}, and those of {type(encoder).__name__} have {found}"
            )


def check_latent_decoder(unet: Any, movq: Any, image_encoder: Any, scheduler: Any) -> None:
    """Raise ValueError if a decoder in latent space is not one that the pipelines of Kandinsky sample."""
    if movq is not None and type(movq).__name__ != "VQModel":
        raise ValueError(f"movq: got {type(movq).__name__}; expected a VQModel (space.autoencoder)")
    if type(scheduler).__name__ == "UnCLIPScheduler":
        raise ValueError("scheduler: UnCLIPScheduler samples embeddings; expected another one (sampler.kind)")
    if unet is None:
        return
    config = unet.config
    if config.out_channels != 2 * config.in_channels:
        raise ValueError(
            f"unet: has {config.out_channels} output channels; expected {2 * config.in_channels}, the pipelines of "
            "Kandinsky split off a learned variance (objective.variational_weight)"
        )
    if config.encoder_hid_dim_type != "image_proj" or config.addition_embed_type != "image":
        raise ValueError(
            "unet: is not conditioned on image embeddings alone; build it with addition_embed_type: image and "
            "encoder_hid_dim_type: image_proj"
        )
    width = config.encoder_hid_dim if image_encoder is None else image_encoder.config.projection_dim
    if config.encoder_hid_dim != width:
        raise ValueError(
            f"unet: takes embeddings of width {config.encoder_hid_dim}, and those of the image encoder have {width}"
        )
    channels = config.in_channels if movq is None else movq.config.vq_embed_dim or movq.config.latent_channels
    if config.in_channels != channels:
        raise ValueError(f"unet: takes {config.in_channels} channels, and the latents of the movq have {channels}")


def check_upsampler(name: str, unet: Any, small_size: int | None) -> None:
    """Raise ValueError if a network, the component `name`, is no upsampler of images of this size."""
    if unet is None:
        return
    if unet.config.in_channels != 6:
        raise ValueError(f"{name}: takes {unet.config.in_channels} channels; an upsampler takes 6, two images")
    if not isinstance(small_size, int) or not 1 <= small_size < unet.config.sample_size:
        raise ValueError(
            f"small_size: got {shown(small_size)}; expected a whole number of pixels below {unet.config.sample_size}"
        )


def said(pipeline: Any, **given: Any) -> list[Any]:
    """Return the values of a call; those that are None are taken from the pipeline's config, by name."""
    return [pipeline.config[name] if value is None else value for name, value in given.items()]


def stage_call(
    stage: str,
    scheduler: Any,
    denoiser: Any,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    latents: bool = False,
) -> None:
    """Raise ValueError if a stage's scheduler or settings are unusable; `stage` begins their names in the call.

    latents: what is sampled are latents; else images or embeddings.
    """
    config = denoiser.config
    embeddings = config.get("embedding_dim")  # a prior's, which no sampler may clip, as latents
    channels, outputs = (3, config.get("out_channels")) if embeddings is None else (embeddings, embeddings)
    channels = config.in_channels if latents else channels
    check_scheduler(scheduler, channels, outputs, may_clip=embeddings is None and not latents)
    fewest = 2 if type(scheduler).__name__ == "UnCLIPScheduler" else 1  # it divides by one less
    whole_number(f"{stage}num_inference_steps", num_inference_steps, fewest, scheduler.config.num_train_timesteps)
    try:
        check_guidance(guidance_scale)
    except ValueError as error:
        raise ValueError(f"{stage}{error}") from None


def checked_level(pipeline: Any, noise_level: int | None) -> int:
    """Return the level of the noise on small images: a timestep that the super-resolution was trained on."""
    trained = pipeline.config.noise_timesteps or pipeline.image_noising_scheduler.config.num_train_timesteps
    if noise_level is None:
        return min(NOISE_LEVEL, int(trained) - 1)
    whole_number("noise_level", noise_level, 0, trained - 1)
    return noise_level


def check_prompted(name: str, unet: Any, text_encoder: Any, channels: int) -> None:
    """Raise ValueError if a network, the component `name`, does not read this language model, or other channels."""
    if unet is None:
        return
    if unet.config.in_channels != channels:
        raise ValueError(f"{name}: takes {unet.config.in_channels} channels; expected {channels}")
    if channels == 6 and unet.config.class_embed_type != "timestep":
        raise ValueError(
            f"{name}: is not conditioned on the level of the noise on the small image; build it with class_embed_type: "
            "timestep"
        )
    width = None if text_encoder is None else text_encoder.config.hidden_size
    taken = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    if width is not None and {width} != ({taken} if isinstance(taken, int) else {*taken}):
        raise ValueError(
            f"{name}: takes states of width {taken}, and those of {type(text_encoder).__name__} have {width}"
        )


def prompt_states(name: str, prompts: list[str], pipeline: Any) -> torch.Tensor:
    """Return the states (B, L, D) of prompts, read by the pipeline's language model; `name` is that of the argument."""
    if pipeline.tokenizer is None or pipeline.text_encoder is None:
        raise ValueError(f"{name}: the pipeline has no text encoder or no tokenizer")
    tokenizer, device = pipeline.tokenizer, pipeline._execution_device
    return encode(name, prompts, tokenizer, pipeline.text_encoder, tokenizer.model_max_length, device)


def both_states(pipeline: Any, prompt: Any, negative_prompt: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states (B, L, D) of a call's prompts and negative prompts, each a string or several."""
    given, null = both_prompts(prompt, negative_prompt)
    return prompt_states("prompt", given, pipeline), prompt_states("negative_prompt", null, pipeline)


def given_smaller(
    pipeline: Any, image: Any, size: int | None, prompt: Any, negative_prompt: Any
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return the small images of a call, (B, 3, size, size) in [-1, 1], and the states of prompts and negative ones.

    size: pixels; None: the images stay as they are.
    """
    small = small_images(image, size).to(pipeline._execution_device)
    states = both_states(pipeline, prompt, negative_prompt)
    if len(states[0]) not in (1, len(small)):
        raise ValueError(f"prompt: got {len(states[0])} for {len(small)} images; expected as many")
    return small, states


def both_prompts(prompt: Any, negative_prompt: Any) -> tuple[list[str], list[str]]:
    """Return a call's prompts and negative prompts; ValueError if they are no texts, or not as many."""
    named = texts("prompt", prompt), texts("negative_prompt", negative_prompt)
    wanted, others = map(len, named)
    if others not in (1, wanted):
        raise ValueError(f"negative_prompt: got {others} for {wanted} prompts; expected one, or one for each")
    return named


def both_texts(pipeline: Any, prompt: Any, negative_prompt: Any) -> tuple[TextEmbeds, TextEmbeds]:
    """Return the embeddings of a call's prompts and negative prompts, each a string or several."""
    prompts = both_prompts(prompt, negative_prompt)
    if pipeline.tokenizer is None or pipeline.text_encoder is None:
        raise ValueError("prompt: the pipeline has no text encoder or no tokenizer")
    names = ("prompt", "negative_prompt")
    given, null = (text_embeds(name, of, pipeline) for name, of in zip(names, prompts, strict=True))
    return given, null


def texts_of(given: TextEmbeds, embeds: torch.Tensor) -> TextEmbeds:
    """Return the text of each image embedding; ValueError if there is neither one for all nor one for each."""
    if len(given.pooled) not in (1, len(embeds)):
        raise ValueError(f"prompt: got {len(given.pooled)} for {len(embeds)} image embeddings; expected as many")
    return given.rows(len(embeds))


def image_output(pipeline: Any, x0: torch.Tensor, output_type: str, return_dict: bool) -> Any:
    """Return the output of a call whose images are `x0`, (B, 3, H, W) in [-1, 1]."""
    pipeline.maybe_free_model_hooks()
    images = x0 if output_type == "latent" else pipeline.image_processor.postprocess(x0, output_type=output_type)
    return ImagePipelineOutput(images=images) if return_dict else (images,)


def callback_steps(pipeline: Any, callback: StepCallback | None) -> Callable[..., tuple[torch.Tensor, bool]]:
    """Return what a stage does after each step: it gives its ``latents`` to the callback of the call."""
    check_callback(callback)

    def after_step(step: int, timestep: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, bool]:
        if callback is not None:
            x_t = (callback(pipeline, step, timestep, {"latents": x_t}) or {}).get("latents", x_t)
        return x_t, pipeline._interrupt

    return after_step


def rows_of(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` rows: those of `tensor`, or its only one so many times."""
    return tensor.expand(count, *tensor.shape[1:]) if len(tensor) == 1 else tensor
