"""The schedulers that sample correctly, for each noise path and prediction type, and their timesteps."""

import inspect
from collections.abc import Sequence
from itertools import pairwise
from math import inf
from numbers import Real
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from .inputs import shown

SECOND_ORDER = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
FIRST_ORDER = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler")
ANY_PREDICTION = (*SECOND_ORDER, *FIRST_ORDER, "DEISMultistepScheduler", "HeunDiscreteScheduler", "SASolverScheduler")
SCHEDULERS = {
    ("diffusion", "epsilon"): (
        *ANY_PREDICTION,
        "EulerAncestralDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
    ),
    ("diffusion", "sample"): (*ANY_PREDICTION, "UnCLIPScheduler"),
    ("flow", "flow_prediction"): SECOND_ORDER,
    ("flow", "sample"): SECOND_ORDER,
}
SCHEDULERS["diffusion", "v_prediction"] = SCHEDULERS["diffusion", "epsilon"]
"""Class names for each noise path and prediction type. A test compares each with a closed form: with the optimal
denoiser of Gaussian data, the samples have the data's mean and standard deviation."""

WRONG = {
    "diffusion": {"LCMScheduler": 36},
    "flow": {"DEISMultistepScheduler": 8, "SASolverScheduler": 7},
}
"""Schedulers that run on a noise path and fail the same test: error of the samples' standard deviation in 25 steps, in
percent of the data's. LCMScheduler is for models that were distilled for it."""

TRAINED_WITH = ("use_flow_sigmas", "rescale_betas_zero_snr")
"""Keys of a scheduler's config that its class must support if they are set, because the model was trained with them."""

RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def check_scheduler(scheduler: Any, channels: int, out_channels: int, may_clip: bool = False) -> None:
    """Raise ValueError, with the remedy, if `scheduler` would run but sample wrongly, or not run at all.

    channels, out_channels: of the denoiser; out_channels is ``2 * channels`` with a learned variance. may_clip: x0 is
    an image in [-1, 1], so that ``clip_sample`` and ``thresholding`` are allowed.
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
    known_keys = inspect.signature(type(scheduler).__init__).parameters
    for key in TRAINED_WITH:
        if config.get(key) and key not in known_keys:
            raise ValueError(
                f"the model was trained with {key}, which {name} does not know; allowed: "
                f"{', '.join(_knowing(allowed, key))}"
            )
    if name not in allowed:
        off = WRONG[path].get(name)
        wrong_by = f"is {off} % off in 25 steps of Gaussian data"
        raise ValueError(
            f"{name} {wrong_by if off else 'is untested here'} for {prediction_type!r} on the {path} path; allowed: "
            f"{', '.join(allowed)}. Set pipe.scheduler = CLASS.from_config(pipe.scheduler.config)"
        )
    # latents are not limited to [-1, 1]
    wrong = [key for key in ("clip_sample", "thresholding") if config.get(key) and not may_clip]
    if path == "flow":
        wrong += [key for key in RESPACINGS if config.get(key)]  # they space the ratios sigma / alpha, not sigma
    if wrong:
        raise ValueError(
            f"{name} with {', '.join(wrong)}=True samples {prediction_type!r} latents on the {path} path wrongly: "
            f"pass {wrong[0]}=False to from_config"
        )
    _check_variance(name, config.get("variance_type"), channels, out_channels)


def _knowing(names: Sequence[str], key: str) -> list[str]:
    """Return the names of the schedulers whose class has the config key `key`."""
    return [name for name in names if key in inspect.signature(getattr(diffusers, name).__init__).parameters]


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    device: torch.device,
    strength: float = 1.0,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> torch.Tensor:
    """Set the timesteps of `scheduler`, and return those of the last `strength` of `num_inference_steps` steps.

    The number of steps is rounded down; schedulers of second order have several timesteps in a step. timesteps,
    sigmas: falling numbers in place of `num_inference_steps`, as in diffusers' `retrieve_timesteps`.

    ValueError if the scheduler does not take them; if no step is left; if steps are left out although the scheduler
    always begins with noise; or if a timestep is outside the model's range. That happens in two cases: trailing spacing
    gives a few odd numbers of steps (61, 103, 121, ...) one step too many, at timestep -1; and leading spacing with
    steps_offset=1 may start at num_train_timesteps.
    """
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    if num_inference_steps < 2 and type(scheduler).__name__ == "UnCLIPScheduler":
        raise ValueError("num_inference_steps: got 1; UnCLIPScheduler takes 2 or more")
    if not given:
        scheduler.set_timesteps(num_inference_steps, device=device)
    else:
        scheduler.set_timesteps(**_checked_times(scheduler, given), device=device)
        num_inference_steps = -(-len(scheduler.timesteps) // scheduler.order)  # Heun's last step has one, not two
    taken = int(num_inference_steps * strength)
    if not taken:
        raise ValueError(
            f"strength: {strength:g} of {num_inference_steps} steps is less than one; use more num_inference_steps, or "
            "more strength"
        )
    if taken < num_inference_steps and scheduler.config.get("skip_prk_steps") is False:
        raise ValueError(
            f"strength: {type(scheduler).__name__} takes its first steps at the highest noise, also from an image: "
            "pass skip_prk_steps=True to from_config"
        )
    skipped = (num_inference_steps - taken) * getattr(scheduler, "order", 1)  # UnCLIPScheduler has none
    left: torch.Tensor = scheduler.timesteps[skipped:]
    if hasattr(scheduler, "set_begin_index"):  # else it looks the timestep up, and takes the second of two equal ones
        scheduler.set_begin_index(skipped)
    low, high, last = left.min().item(), left.max().item(), scheduler.config.num_train_timesteps - 1
    if low < 0 or high > last:
        raise ValueError(
            f"{next(iter(given), 'num_inference_steps')}: {num_inference_steps} make {type(scheduler).__name__} take "
            f"timesteps from {high:g} to {low:g}, and the model knows only {last} to 0; use "
            f"{'others' if given else 'some steps more or fewer'}"
        )
    return left


def _checked_times(scheduler: Any, given: dict[str, Sequence[float]]) -> dict[str, NDArray[np.float64]]:
    """Return the timesteps or sigmas in `given` as arguments of ``scheduler.set_timesteps``."""
    if len(given) > 1:
        raise ValueError("timesteps, sigmas: got both; give one of them")
    ((name, values),) = given.items()
    known = inspect.signature(scheduler.set_timesteps).parameters
    flow = scheduler.config.get("use_flow_sigmas")  # for flow, diffusers takes sigmas but no timesteps
    if name not in known or (name == "timesteps" and flow):
        kind = f"{type(scheduler).__name__}{' on the flow path' if flow else ''}"
        raise ValueError(f"{name}: {kind} takes none; leave them out for num_inference_steps")
    if isinstance(values, torch.Tensor | np.ndarray):
        values = values.tolist()
    falling = isinstance(values, list | tuple) and values and all(isinstance(value, Real) for value in values)
    if not falling or not all(one > other for one, other in pairwise(values)) or not 0 <= values[-1] <= values[0] < inf:
        raise ValueError(f"{name}: got {shown(values)}; expected falling numbers from 0 on, in a list")
    return {name: np.array(values)}


def step_options(
    scheduler: Any, generator: Any, eta: float, next_timestep: torch.Tensor | None = None
) -> dict[str, Any]:
    """Return the optional arguments of ``scheduler.step`` that this scheduler has.

    next_timestep: the timestep that the step leads to, None for the last step; only UnCLIPScheduler does not know it.
    eta: share of DDPM's noise that DDIM adds (Song et al. 2021, eq. 16). If x0 is clipped, the predicted noise is
    computed again from x_t and the clipped x0, as in guided-diffusion (`use_clipped_model_output`); diffusers' default
    keeps the noise from before, which does not fit it.
    """
    clips = bool(scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"))
    # diffusers takes the root of 1 - alpha^2 - std^2, which rounds below 0 at eta 1 where alpha is 0
    options = {"generator": generator, "eta": min(eta, 1 - 1e-6), "use_clipped_model_output": clips}
    options["prev_timestep"] = next_timestep
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in options.items() if name in known}


def check_eta(scheduler: Any, eta: float) -> None:
    """Raise ValueError if `eta` is not a number from 0 to 1, or if it is above 0 and the scheduler takes none."""
    if not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise ValueError(f"eta: got {shown(eta)}; expected a number from 0 (no noise) to 1 (DDPM's noise)")
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"eta: {type(scheduler).__name__} has none; leave it out, or use DDIMScheduler")


def takes_variance(scheduler: Any) -> bool:
    """Return True if `scheduler` takes a learned variance with the mean (Nichol & Dhariwal 2021, eq. 15)."""
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
    if name != "DDPMScheduler" and channels != 3:  # diffusers' DPM solvers slice [:, :3]
        raise ValueError(
            f"{name} with variance_type {variance_type!r} keeps 3 of {channels} channels: pass variance_type=None "
            "to from_config; the learned variance is for DDPMScheduler"
        )
