"""The stages of a cascade, as functions of their networks: text to embedding, embedding to image, image to larger."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from .inputs import MAX_IMAGES, check_generators, whole_number
from .sampling import both, denoise, guided_output
from .schedulers import set_timesteps
from .stages import TextEmbeds, both_texts, rows_of, said, stage_call

SMALLEST_ANGLE = 1e-4
"""Sine of an angle below which `slerp` takes the straight line."""
SMALLEST_ALPHA = 5e-3
"""Alpha at the last timestep below which a predicted noise gives no estimate of the image; `linear` has 6e-3."""
Generators = torch.Generator | Sequence[torch.Generator] | None


class Sampling(NamedTuple):
    """The settings of one stage's sampling."""

    num_inference_steps: int
    guidance_scale: float = 1.0
    progress: Callable[[torch.Tensor], Iterable[torch.Tensor]] = iter
    after_step: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, bool]] | None = None
    latents: torch.Tensor | None = None
    """Unit noise to start from, in place of the generators'."""
    eta: float = 0.0
    """Share of noise that DDIM adds."""


def sampled_embeds(
    prior: Any, scheduler: Any, given: TextEmbeds, null: TextEmbeds, how: Sampling, generator: Generators, count: int
) -> torch.Tensor:
    """Return the image embeddings (B, D), float32, that a prior predicts for texts.

    count: candidates for each text; the one most like the text's own embedding is kept (Ramesh et al. 2022, 2.2).
    """
    several = given.repeated(count)
    noise = _noise((len(several.pooled), prior.config.embedding_dim), generator, count, given.pooled.device)
    nothing = null.rows(len(given.pooled)).repeated(count)
    kwargs = _guided(how, _of_prior(several, prior.dtype), _of_prior(nothing, prior.dtype))
    if isinstance(generator, list | tuple):
        generator = [one for one in generator for _ in range(count)]
    x0 = _sampled(prior, scheduler, noise, how, generator, (), kwargs)
    embeds: torch.Tensor = prior.post_process_latents(x0.to(prior.dtype)).float()
    embeds = embeds.view(-1, count, embeds.shape[1])
    likeness = F.cosine_similarity(embeds, given.pooled.float()[:, None], dim=-1)
    return embeds[torch.arange(len(embeds)), likeness.argmax(1).cpu()]


def prompt_image_embeds(
    pipeline: Any,
    stage: str,
    networks: tuple[Any, Any],
    prompts: tuple[Any, Any],
    settings: tuple[int | None, float | None],
    count: int,
    generator: Generators,
    after_step: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Return the image embeddings (B, D), float32, that a pipeline's prior predicts for the prompts of a call.

    stage: as in `stage_call`. networks: the prior and its scheduler. prompts: and negative ones. settings: steps and
    guidance scale, None: as in the pipeline's config. count: as in `sampled_embeds`.
    """
    names = f"{stage}num_inference_steps", f"{stage}guidance_scale"
    steps, scale = said(pipeline, **dict(zip(names, settings, strict=True)))
    prior, scheduler = networks
    stage_call(stage, scheduler, prior, steps, scale)
    whole_number("num_candidates", count, 1, MAX_IMAGES)
    given, null = both_texts(pipeline, *prompts)
    how = Sampling(steps, scale, pipeline.progress_bar, after_step)
    return sampled_embeds(prior, scheduler, given, null, how, generator, count)


def decoded_latents(
    unet: Any, scheduler: Any, given: torch.Tensor, null: torch.Tensor, how: Sampling, generator: Generators
) -> torch.Tensor:
    """Return latents (B, C, h, w) of image embeddings (B, D), and of nothing else."""
    size, count = unet.config.sample_size, len(given)
    noise = _noise((count, unet.config.in_channels, size, size), generator, 1, given.device)
    kwargs = _guided(how, _of_embeds(given, unet.dtype), _of_embeds(rows_of(null, count), unet.dtype))
    return _sampled(unet, scheduler, noise, how, generator, (), kwargs)


def latents_or_images(
    pipeline: Any, given: torch.Tensor, null: torch.Tensor, how: Sampling, generator: Generators, output_type: str
) -> torch.Tensor:
    """Return images (B, 3, H, W) in [-1, 1], not clipped, of image embeddings (B, D), decoded by a pipeline's MoVQ.

    given, null: embeddings, and that of no image, (1, D). output_type: "latent": the latents (B, C, h, w) instead.
    """
    latents = decoded_latents(pipeline.unet, pipeline.scheduler, given, null, how, generator)
    if output_type == "latent":
        return latents
    images: torch.Tensor = pipeline.movq.decode(latents.to(pipeline.movq.dtype), force_not_quantize=True).sample
    return images.float()


def decoded_images(
    unet: Any,
    scheduler: Any,
    given: tuple[torch.Tensor, TextEmbeds],
    null: tuple[torch.Tensor, TextEmbeds],
    how: Sampling,
    generator: Generators,
) -> torch.Tensor:
    """Return images (B, 3, H, W) in [-1, 1], not clipped, of image embeddings (B, D) and texts."""
    size, count = unet.config.sample_size, len(given[0])
    nothing = rows_of(null[0], count), null[1].rows(count)
    shape = count, unet.config.in_channels, size, size
    noise = _noise(shape, generator, 1, given[0].device) if how.latents is None else how.latents
    kwargs = _guided(how, _of_decoder(*given, unet.dtype), _of_decoder(*nothing, unet.dtype))
    return _sampled(unet, scheduler, noise, how, generator, (), kwargs)


def ddim(scheduler: Any, inverse: bool = False) -> Any:
    """Return DDIM on the noise path of `scheduler`, or its inverse, from an image to noise, at the same timesteps.

    Neither clips its estimate of the image: a step that clips has no inverse. ValueError where that cannot work: on the
    flow path; of a predicted image, from which an image has no noise; and of predicted noise on a path that ends
    without the image, where an error of the noise becomes one of the image, multiplied by sigma / alpha.
    """
    kind = DDIMInverseScheduler if inverse else DDIMScheduler
    known = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs", "thresholding", "steps_offset"}
    config = {name: value for name, value in scheduler.config.items() if name in known}
    found = kind.from_config(config | {"timestep_spacing": "trailing", "clip_sample": False})
    alpha, predicted = float(found.alphas_cumprod[-1].sqrt()), scheduler.config.prediction_type
    unfit = {
        "the flow path": bool(scheduler.config.get("use_flow_sigmas")),
        "predicted images": predicted == "sample" and inverse,
        f"predicted noise where alpha ends at {alpha:.1g}": predicted == "epsilon" and alpha < SMALLEST_ALPHA,
    }
    for what, is_so in unfit.items():
        if is_so:
            raise ValueError(
                f"decoder: DDIM without clipping, which eta and an image's own noise need, goes astray with {what}. "
                "Train a decoder with objective.prediction_type: v_prediction on another path"
            )
    return found


def upsampled_images(
    unet: Any, scheduler: Any, images: torch.Tensor, how: Sampling, generator: Generators
) -> torch.Tensor:
    """Return images of the upsampler's size, (B, 3, H, W) in [-1, 1], not clipped, of small ones in [-1, 1]."""
    large = _enlarged(images, unet.config.sample_size)
    noise = _noise(tuple(large.shape), generator, 1, large.device)
    return _sampled(unet, scheduler, noise, how, generator, (large,), {})


def prompted_images(
    unet: Any, scheduler: Any, given: torch.Tensor, null: torch.Tensor, how: Sampling, generator: Generators
) -> torch.Tensor:
    """Return images (B, 3, H, W) in [-1, 1], not clipped, of the states (B, L, D) of prompts."""
    size, count = unet.config.sample_size, len(given)
    noise = _noise((count, unet.config.in_channels, size, size), generator, 1, given.device)
    kwargs = _guided(how, _of_states(given, unet.dtype), _of_states(rows_of(null, count), unet.dtype))
    return _sampled(unet, scheduler, noise, how, generator, (), kwargs)


def prompted_larger_images(
    unet: Any,
    scheduler: Any,
    images: torch.Tensor,
    noised: tuple[Any, int],
    states: tuple[torch.Tensor, torch.Tensor],
    how: Sampling,
    generator: Generators,
) -> torch.Tensor:
    """Return images of the network's size, (B, 3, H, W) in [-1, 1], not clipped, of small ones in [-1, 1] and prompts.

    noised: the scheduler that adds noise to the small images, enlarged, and its timestep. states: those of the prompts
    and of the negative prompts, (B, L, D) or (1, L, D).
    """
    large, count, (noising, level) = _enlarged(images, unet.config.sample_size), len(images), noised
    noise, augmentation = (_noise(tuple(large.shape), generator, 1, large.device) for _ in range(2))
    levels = torch.full((count,), level, device=large.device)
    large = noising.add_noise(large, augmentation, levels)
    given, null = (_of_states(rows_of(one, count), unet.dtype) | {"class_labels": levels} for one in states)
    channels = _guided(how, (large,), (large,))
    return _sampled(unet, scheduler, noise, how, generator, channels, _guided(how, given, null))


def slerp(start: torch.Tensor, end: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the embeddings (N, D) at N shares of the great circle from `start` to `end`, each (1, D).

    Norms change evenly. Equal or opposite directions have no single great circle: the straight line is taken.
    """
    shares = shares[:, None]
    one, other = F.normalize(start, dim=1), F.normalize(end, dim=1)
    angle = (one * other).sum().clamp(-1, 1).acos()
    if angle.sin().abs() < SMALLEST_ANGLE:
        return torch.lerp(start, end, shares)
    turned = (((1 - shares) * angle).sin() * one + (shares * angle).sin() * other) / angle.sin()
    return turned * torch.lerp(start.norm(), end.norm(), shares)


def _enlarged(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return small images in [-1, 1] of 8 bits, enlarged, as in training."""
    small = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return F.interpolate(small, size=(size, size), mode="bilinear", align_corners=True)


def _noise(shape: tuple[int, ...], generator: Generators, count: int, device: torch.device) -> torch.Tensor:
    """Return unit noise; each generator of a list makes that of `count` samples."""
    check_generators(generator, shape[0] // count)
    if isinstance(generator, list | tuple):
        rows = [randn_tensor((count, *shape[1:]), one, device, torch.float32) for one in generator]
        return torch.cat(rows)
    noise: torch.Tensor = randn_tensor(shape, generator, device, torch.float32)
    return noise


def _sampled(
    denoiser: Any,
    scheduler: Any,
    noise: torch.Tensor,
    how: Sampling,
    generator: Generators,
    channels: Sequence[torch.Tensor],
    kwargs: Mapping[str, Any],
) -> torch.Tensor:
    times = set_timesteps(scheduler, how.num_inference_steps, noise.device)
    generator = list(generator) if isinstance(generator, list | tuple) else generator

    def predict(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return guided_output(denoiser, scheduler, x_t, timestep, how.guidance_scale, channels, kwargs)

    return denoise(predict, scheduler, noise, times, generator, how.after_step, how.progress, eta=how.eta)


def _guided(how: Sampling, given: Any, null: Any) -> Any:
    return both(null, given) if how.guidance_scale > 1 else given


def _of_prior(text: TextEmbeds, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    states, pooled = text.states.to(dtype), text.pooled.to(dtype)
    return {"proj_embedding": pooled, "encoder_hidden_states": states, "attention_mask": text.mask}


def _of_states(states: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": states.to(dtype)}


def _of_embeds(embeds: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    # the U-Net projects the embeddings to the states itself
    return {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": embeds.to(dtype)}}


def _of_decoder(embeds: torch.Tensor, text: TextEmbeds, dtype: torch.dtype) -> dict[str, Any]:
    added = {"image_embeds": embeds.to(dtype), "text_embeds": text.pooled.to(dtype)}
    return {"encoder_hidden_states": text.states.to(dtype), "added_cond_kwargs": added}
