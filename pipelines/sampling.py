"""The sampling loop and classifier-free guidance, for any space, denoiser and conditions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .image import StartImage
from .schedulers import step_options, takes_variance

PredictOutput = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``predict(x_t, timestep)``: the model output for ``scheduler.step``, guided if there is guidance."""
AfterStep = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, bool]]
"""``after_step(step, timestep, x_t)``: the x_t to continue with, and True to stop."""

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]
"""``callback(pipeline, step, timestep, tensors)``: the tensors that it replaces, by name."""


def guide(
    uncond: torch.Tensor, cond: torch.Tensor, guidance_scale: float, channels: int, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Return the guided model output, shaped like `cond`: ``uncond + guidance_scale * (cond - uncond)``.

    A `guidance_scale` of 0 gives the unconditional prediction, 1 the conditional one; above 1 it extrapolates (Ho &
    Salimans 2022, eq. 6, whose w is guidance_scale - 1). The rule is linear, so it is the same for every prediction
    type.
    guidance_rescale: from 0, none, to 1. Guidance makes the standard deviation of each sample larger than that of
    `cond`; a rescaled output, with the standard deviation of `cond`, is mixed in with this share (Lin et al. 2024,
    section 3.4: against overexposed images, above all with zero terminal SNR).

    uncond, cond: (B, channels, ...), or (B, 2 * channels, ...) of a network with a learned variance. In the second
    case only the first half, the mean, is guided; the variance is the conditional one, as in GLIDE (Nichol et al.
    2022), because an extrapolated variance means nothing. ValueError for other numbers of channels or unequal shapes.
    """
    if uncond.shape != cond.shape or cond.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"model outputs of shapes {tuple(uncond.shape)} and {tuple(cond.shape)}; expected two alike with "
            f"{channels} channels, or {2 * channels} with a learned variance"
        )
    mean_uncond, mean_cond = uncond[:, :channels], cond[:, :channels]
    mean = mean_uncond + guidance_scale * (mean_cond - mean_uncond)
    if guidance_rescale:
        axes = list(range(1, mean.ndim))
        rescaled = mean * (mean_cond.std(axes, keepdim=True) / mean.std(axes, keepdim=True))
        mean = guidance_rescale * rescaled + (1 - guidance_rescale) * mean
    return torch.cat([mean, cond[:, channels:]], dim=1)


def denoise(
    predict: PredictOutput,
    scheduler: Any,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    after_step: AfterStep | None = None,
    progress: Callable[[torch.Tensor], Iterable[torch.Tensor]] = iter,
    start_image: StartImage | None = None,
    eta: float = 0.0,
) -> torch.Tensor:
    """Return x0, sampled from unit `noise`, both (B, C, ...), with one step of `scheduler` at each of its `timesteps`.

    x_t is float32 throughout: bfloat16 would lose the small steps. generator, eta: for schedulers that add noise
    (`step_options`). progress: iterates over the timesteps, with a progress bar. start_image: an image to start from at
    the first timestep. FloatingPointError if a step gives NaN or infinity.
    """
    noise = noise.float()
    x_t: torch.Tensor = noise * scheduler.init_noise_sigma
    if start_image is not None:
        x_t = start_image.start(scheduler, noise, timesteps)
    for step, timestep in enumerate(progress(timesteps)):
        then = timesteps[step + 1] if step + 1 < len(timesteps) else None
        options = step_options(scheduler, generator, eta, then)
        x_t = scheduler.step(predict(x_t, timestep), timestep, x_t, **options, return_dict=False)[0]
        if not x_t.isfinite().all():
            raise FloatingPointError(
                f"non-finite latents at step {step} of {len(timesteps)}: check the denoiser's weights and the "
                "conditions for NaN and infinity, or leave half precision for float32"
            )
        if start_image is not None:
            x_t = start_image.keep(scheduler, noise, timesteps[step + 1 :], x_t)
        stop = False
        if after_step is not None:
            x_t, stop = after_step(step, timestep, x_t)
        if stop:
            break
    return x_t


def guided_output(
    denoiser: Any,
    scheduler: Any,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    guidance_scale: float,
    channels: Sequence[torch.Tensor] = (),
    kwargs: Mapping[str, Any] | None = None,
    guidance_rescale: float = 0.0,
) -> torch.Tensor:
    """Return the guided model output for ``scheduler.step``, float32, with the learned variance if the step uses it.

    channels, kwargs: the conditions of the B samples, as more input channels and as keyword arguments. With guidance (a
    scale above 1) they have 2B rows, the null conditions first (`both`): one pass computes both outputs.
    guidance_rescale: as in `guide`.
    """
    guided, width = guidance_scale > 1, x_t.shape[1]
    model_input = scheduler.scale_model_input(torch.cat([x_t] * 2) if guided else x_t, timestep)
    model_input = torch.cat([model_input, *channels], 1).to(denoiser.dtype)
    timesteps = timestep.expand(len(model_input))  # transformer denoisers take no scalar
    model_output: torch.Tensor = denoiser(model_input, timestep=timesteps, **kwargs or {}, return_dict=False)[0]
    model_output = model_output.to(x_t.dtype)
    if guided:
        uncond, cond = model_output.chunk(2)
        model_output = guide(uncond, cond, guidance_scale, width, guidance_rescale)
    return model_output if takes_variance(scheduler) else model_output[:, :width]


def both(null: Any, given: Any) -> Any:
    """Return null and given conditions as one batch: tensors are concatenated, also those in dicts and lists."""
    if isinstance(given, Mapping):
        return {name: both(null[name], given[name]) for name in given}
    if isinstance(given, list | tuple):
        return tuple(both(one, other) for one, other in zip(null, given, strict=True))
    return None if given is None else torch.cat([null, given])
