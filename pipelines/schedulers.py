"""The schedulers that sample each kind of model rightly."""

import inspect
from typing import Any

import torch

SECOND_ORDER = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
FIRST_ORDER = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler")
SCHEDULERS = {
    ("diffusion", "epsilon"): (
        *SECOND_ORDER,
        *FIRST_ORDER,
        "DEISMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
    ),
    ("diffusion", "sample"): (*SECOND_ORDER, *FIRST_ORDER, "DEISMultistepScheduler", "HeunDiscreteScheduler"),
    ("flow", "flow_prediction"): SECOND_ORDER,
    ("flow", "sample"): SECOND_ORDER,
}
SCHEDULERS["diffusion", "v_prediction"] = SCHEDULERS["diffusion", "epsilon"]
"""Class names for each noise path and prediction type. Each is held to a closed form by a test: with the perfect
denoiser of Gaussian data the samples have the data's mean and standard deviation. DEIS and SASolver run on the flow
path too, but their samples of 25 steps are several percent off; others are refused by name for being untested."""

RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def check_scheduler(scheduler: Any, channels: int, out_channels: int, may_clip: bool = False) -> None:
    """Raise ValueError, with the remedy, if `scheduler` would run but sample wrongly, or not run at all.

    channels, out_channels: of the denoiser; out_channels is ``2 * channels`` with a learned variance. may_clip: x0 is
    in [-1, 1], as that of pictures, and ``clip_sample`` and ``thresholding`` are right.
    """
    name, config = type(scheduler).__name__, scheduler.config
    path = "flow" if config.get("use_flow_sigmas") else "diffusion"
    prediction_type = config.get("prediction_type")
    allowed = SCHEDULERS.get((path, prediction_type), ())
    if not allowed:
        known = ", ".join(f"{kind!r} ({path} path)" for path, kind in SCHEDULERS)
        raise ValueError(
            f"{name} has prediction_type {prediction_type!r} on the {path} path; expected {known}, where the flow "
            "path is that of use_flow_sigmas=True"
        )
    if name not in allowed:
        raise ValueError(
            f"{name} does not sample {prediction_type!r} on the {path} path rightly; allowed: {', '.join(allowed)}. "
            "Set pipe.scheduler = CLASS.from_config(pipe.scheduler.config)"
        )
    known_keys = inspect.signature(type(scheduler).__init__).parameters
    # latents reach well beyond 1
    wrong = [key for key in ("clip_sample", "thresholding") if config.get(key) and not may_clip]
    if path == "flow":
        wrong += [key for key in RESPACINGS if config.get(key)]  # these space ratios sigma / alpha, not sigma
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known_keys:
        raise ValueError(
            f"the model was trained with zero terminal SNR (rescale_betas_zero_snr), which {name} does not know; "
            "use DPMSolverMultistepScheduler, DDIMScheduler or EulerDiscreteScheduler"
        )
    if wrong:
        raise ValueError(
            f"{name} with {', '.join(wrong)}=True samples {prediction_type!r} latents on the {path} path wrongly: "
            f"pass {wrong[0]}=False to from_config"
        )
    _check_variance(name, config.get("variance_type"), channels, out_channels)


def set_timesteps(
    scheduler: Any, num_inference_steps: int, device: torch.device, strength: float = 1.0
) -> torch.Tensor:
    """Return the timesteps of the last `strength` of `num_inference_steps` steps, to which `scheduler` is set.

    At least one a step, in whole steps, rounded down. ValueError if that is none; if it is not all of them and the
    scheduler always begins with noise.
    ValueError if any is outside of the model's. Trailing spacing rounds a few odd numbers of steps (61, 103, 121, ...)
    to one step too many, at timestep -1; leading spacing with steps_offset=1 starts some at num_train_timesteps.
    """
    scheduler.set_timesteps(num_inference_steps, device=device)
    taken = int(num_inference_steps * strength)
    if not taken:
        raise ValueError(
            f"strength: {strength:g} of {num_inference_steps} steps is less than one; use more num_inference_steps, or "
            "more strength"
        )
    if taken < num_inference_steps and scheduler.config.get("skip_prk_steps") is False:
        raise ValueError(
            f"strength: {type(scheduler).__name__} takes its first steps at the highest noise whatever it starts from: "
            "pass skip_prk_steps=True to from_config"
        )
    skipped = (num_inference_steps - taken) * scheduler.order
    timesteps: torch.Tensor = scheduler.timesteps[skipped:]
    if hasattr(scheduler, "set_begin_index"):  # else the first timestep is looked up, and of equal ones the second
        scheduler.set_begin_index(skipped)
    low, high, last = timesteps.min().item(), timesteps.max().item(), scheduler.config.num_train_timesteps - 1
    if low < 0 or high > last:
        raise ValueError(
            f"num_inference_steps: {num_inference_steps} make {type(scheduler).__name__} take timesteps from {high:g} "
            f"to {low:g}, of which the model knows {last} to 0; use some steps more or fewer"
        )
    return timesteps


def takes_variance(scheduler: Any) -> bool:
    """Return whether `scheduler` wants the learned variance with the mean (Nichol & Dhariwal 2021, eq. 15)."""
    return type(scheduler).__name__ == "DDPMScheduler" and _learned(scheduler.config.get("variance_type"))


def _learned(variance_type: str | None) -> bool:
    return variance_type in ("learned", "learned_range")


def _check_variance(name: str, variance_type: str | None, channels: int, out_channels: int) -> None:
    if not _learned(variance_type):
        return
    if name == "DDPMScheduler" and out_channels != 2 * channels:
        raise ValueError(
            f"variance_type {variance_type!r} needs a denoiser with {2 * channels} output channels, this one has "
            f"{out_channels}: pass variance_type='fixed_small' to from_config"
        )
    if name != "DDPMScheduler" and channels != 3:  # the slice [:, :3] in diffusers' DPM solvers
        raise ValueError(
            f"{name} with variance_type {variance_type!r} keeps 3 of {channels} channels: pass variance_type=None "
            "to from_config; the learned variance is for DDPMScheduler"
        )
