"""Whether the sampling scheduler and the training objective mean the same noise and the same model output."""

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
"""Of the Gaussian data whose perfect denoiser is sampled."""
SAMPLES = 10_000
ENOUGH_STEPS = 250
STD_TOLERANCE = 0.05
"""Of the samples' std at `ENOUGH_STEPS`, as a share: every scheduler of `build_scheduler` is within 0.04 there."""
FEW_STEPS_TOLERANCE = 0.15
"""Of the same at fewer steps: 20 steps are within 0.10."""


def level_difference(objective: Objective, scheduler: Any) -> float:
    """Return the largest difference of alpha and sigma between `scheduler` and training, at the scheduler's timesteps.

    `scheduler` is set to its timesteps, and has ``sigmas`` of them, those of the flow path or else sigma / alpha with
    alpha^2 + sigma^2 = 1; or ``alphas_cumprod``, alpha^2 of every time (DDPM, DDIM). In float64; what is left of
    diffusers' float32 and integers: see `level_tolerance`.
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
    """Return what `level_difference` may be.

    On the flow path diffusers rounds timesteps down to whole numbers, 1 / T; elsewhere a last alpha of 0 is 2^-12.
    """
    config = objective.config
    return 1e-6 + (1 / config.num_train_timesteps if config.path == "flow" else 2**-12)


def gaussian_std(objective: Objective, scheduler: Any, num_inference_steps: int) -> float:
    """Return the std of samples of data N(0, `DATA_STD`^2), as a share of what it should be: 1 if all is right.

    The network is the perfect one for that data, by the objective's own schedule and prediction type:
    ``x0 = alpha s^2 / (alpha^2 s^2 + sigma^2) x_t``. The samples begin with the std that noised data have at the first
    timestep. All is linear, so the std is exact for samplers without noise of their own, and within 1 % for ancestral
    ones. Nothing is clipped: Gaussian data are not in [-1, 1].
    """
    scheduler = copy.deepcopy(scheduler)
    if scheduler.config.get("clip_sample"):
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    draws = torch.Generator().manual_seed(0)
    noisy = "generator" in inspect.signature(scheduler.step).parameters
    noise_options = {"generator": draws} if noisy else {}
    alpha, sigma = _alpha_sigma(objective, scheduler.timesteps[0])
    x_t = torch.randn(SAMPLES, 1, dtype=torch.float64, generator=draws)
    x_t *= (alpha**2 * DATA_STD**2 + sigma**2).sqrt() / x_t.std()
    for timestep in scheduler.timesteps:
        alpha, sigma = _alpha_sigma(objective, timestep)
        posterior = x_t / (alpha**2 * DATA_STD**2 + sigma**2)
        x0, noise = alpha * DATA_STD**2 * posterior, sigma * posterior
        a, b = target_coefficients(objective.config.prediction_type, alpha, sigma)
        output = a * x0 + b * noise
        if scheduler.config.get("variance_type") == "learned_range":  # the posterior's, the lower of its bounds
            output = torch.cat([output, -torch.ones_like(output)], 1)
        x_t = scheduler.step(output, timestep, x_t, **noise_options, return_dict=False)[0].double()
    return float(x_t.std() / DATA_STD)


def _alpha_sigma(objective: Objective, timestep: Tensor) -> tuple[Tensor, Tensor]:
    return objective.schedule.alpha_sigma(timestep.reshape(1), torch.float64)


def agreement(objective: Objective, scheduler: Any, num_inference_steps: int) -> Finding:
    """Return whether `scheduler` samples what `objective` trains: the same noise levels, and Gaussian data as it is."""
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
        faults.append(f"it takes the model output for {kind}, training is of {wanted.prediction_type}")
    warnings = []
    if not faults and abs(few - 1) > FEW_STEPS_TOLERANCE:
        warnings.append(
            f"validation.num_inference_steps {num_inference_steps}: too few for this path, images will be flat or "
            "blurred; 20 or more are usual"
        )
    remedy = f"; {'; '.join(faults)}: sample with ldm.models.scheduler.build_scheduler of the objective trained"
    return Finding("objective and scheduler", not faults, text + (remedy if faults else ""), tuple(warnings))
