"""Check that the sampling scheduler and the training objective agree: on noise levels and on the model output."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from ldm.doctor.findings import Finding
from ldm.objectives.denoising import Objective
from ldm.objectives.schedule import target_coefficients

DATA_STD = 0.5
"""Standard deviation of the Gaussian data whose perfect denoiser is sampled."""
SAMPLES = 10_000
"""Number of samples of the Gaussian data."""
ENOUGH_STEPS = 250
"""Sampling steps after which the error of a correct scheduler is small."""
STD_TOLERANCE = 0.05
"""Tolerance on the relative standard deviation with `ENOUGH_STEPS`; the schedulers of `build_scheduler` reach 0.04."""
FEW_STEPS_TOLERANCE = 0.15
"""Tolerance on the relative standard deviation with fewer steps; with 20 steps they reach 0.10."""


def level_difference(objective: Objective, scheduler: Any) -> float:
    """Return the largest difference of alpha and sigma between `scheduler` and training, at the scheduler's timesteps.

    `scheduler` has its timesteps set. It has either ``sigmas`` for them, which are sigma on the flow path and sigma /
    alpha elsewhere (alpha^2 + sigma^2 = 1); or ``alphas_cumprod``, alpha^2 at every time (DDPM, DDIM). Differences are
    taken in float64. diffusers rounds to float32 and integers, which `level_tolerance` allows for.
    """
    timesteps = scheduler.timesteps.cpu()
    if not hasattr(scheduler, "sigmas"):
        squared = scheduler.alphas_cumprod[timesteps].double()
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    else:
        sigmas = scheduler.sigmas[: len(timesteps)].double().cpu()
        flow = scheduler.config.get("use_flow_sigmas")
        alpha = 1 - sigmas if flow else (1 + sigmas.square()).rsqrt()
        sigma = sigmas if flow else alpha * sigmas
    trained_alpha, trained_sigma = objective.schedule.alpha_sigma(timesteps, torch.float64)
    return float(torch.stack([alpha - trained_alpha, sigma - trained_sigma]).abs().max())


def level_tolerance(objective: Objective) -> float:
    """Return the greatest `level_difference` that rounding explains.

    On the flow path diffusers rounds timesteps down to whole numbers, an error of up to 1 / T. On other paths it
    replaces a last alpha of 0 by 2^-12.
    """
    config = objective.config
    return 1e-6 + (1 / config.num_train_timesteps if config.path == "flow" else 2**-12)


def gaussian_std(objective: Objective, scheduler: Any, num_inference_steps: int) -> float:
    """Return the standard deviation of sampled data N(0, `DATA_STD`^2), relative to `DATA_STD`: 1 if all is right.

    The network is the perfect denoiser of that data, by the objective's schedule and prediction type:
    ``x0 = alpha s^2 / (alpha^2 s^2 + sigma^2) x_t``. Samples begin with the standard deviation of noised data at the
    first timestep. Every step is linear, so the result is exact for samplers that add no noise, and within 1 % for
    ancestral ones. Nothing is clipped, because Gaussian data are not limited to [-1, 1].
    """
    scheduler = copy.deepcopy(scheduler)
    limits = [name for name in ("clip_sample", "thresholding") if scheduler.config.get(name)]
    scheduler.register_to_config(**dict.fromkeys(limits, False))
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(0)
    known = inspect.signature(scheduler.step).parameters
    alpha, sigma = _alpha_sigma(objective, scheduler.timesteps[0])
    x_t = torch.randn(SAMPLES, 1, dtype=torch.float64, generator=generator)
    x_t *= (alpha**2 * DATA_STD**2 + sigma**2).sqrt() / x_t.std()
    for timestep, then in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        alpha, sigma = _alpha_sigma(objective, timestep)
        posterior = x_t / (alpha**2 * DATA_STD**2 + sigma**2)
        x0, noise = alpha * DATA_STD**2 * posterior, sigma * posterior
        a, b = target_coefficients(objective.config.prediction_type, alpha, sigma)
        output = a * x0 + b * noise
        if scheduler.config.get("variance_type") == "learned_range":  # the lower bound of the variance: the posterior's
            output = torch.cat([output, -torch.ones_like(output)], 1)
        options = {"generator": generator, "prev_timestep": then}
        options = {name: value for name, value in options.items() if name in known}
        x_t = scheduler.step(output, timestep, x_t, **options, return_dict=False)[0].double()
    return float(x_t.std() / DATA_STD)


def _alpha_sigma(objective: Objective, timestep: Tensor) -> tuple[Tensor, Tensor]:
    return objective.schedule.alpha_sigma(timestep.reshape(1), torch.float64)


def agreement(objective: Objective, scheduler: Any, num_inference_steps: int) -> Finding:
    """Return the finding on whether `scheduler` samples what `objective` trains.

    The noise levels must be the same, and the perfect denoiser of Gaussian data must give that data.
    """
    name, wanted = type(scheduler).__name__, objective.config
    scheduler.set_timesteps(num_inference_steps)
    difference, most = level_difference(objective, scheduler), level_tolerance(objective)
    few = gaussian_std(objective, scheduler, num_inference_steps)
    enough = max(num_inference_steps, min(ENOUGH_STEPS, wanted.num_train_timesteps))
    std = gaussian_std(objective, scheduler, enough)
    text = (
        f"{name} has the noise levels of the {wanted.path} path to {difference:.1g}; the perfect denoiser of "
        f"N(0, {DATA_STD:g}^2) gives {few:.3f} of that std in {num_inference_steps} steps, {std:.3f} in {enough}"
    )
    faults = []
    if difference > most:
        faults.append(f"the levels may differ by {most:.1g}")
    if abs(std - 1) > STD_TOLERANCE:
        faults.append(f"{enough} steps should give 1 within {STD_TOLERANCE:g}")
    if (kind := scheduler.config.prediction_type) != wanted.prediction_type:
        faults.append(f"it reads the model output as {kind}, and training predicts {wanted.prediction_type}")
    warnings = []
    if not faults and abs(few - 1) > FEW_STEPS_TOLERANCE:
        warnings.append(
            f"validation.num_inference_steps {num_inference_steps}: too few for this path, images will be flat or "
            "blurred; 20 or more are usual"
        )
    remedy = f"; {'; '.join(faults)}: sample with ldm.models.scheduler.build_scheduler of the objective trained"
    return Finding("objective and scheduler", not faults, text + (remedy if faults else ""), tuple(warnings))
