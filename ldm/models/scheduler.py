"""The sampling scheduler of a trained objective."""

from __future__ import annotations

from typing import Any, cast, get_args

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UnCLIPScheduler

from ldm.config import ObjectiveConfig, PredictionType, SamplerConfig
from ldm.errors import ConfigError
from ldm.objectives.schedule import BETAS, DiscreteSchedule, FlowSchedule, Schedule, refuse_unsound

DPM_SOLVER = SamplerConfig()
NO_LIMIT = 100.0
"""Largest value that dynamic thresholding divides by: so large that it never limits."""


def build_scheduler(config: ObjectiveConfig, sampler: SamplerConfig = DPM_SOLVER, clip_sample: bool = False) -> Any:
    """Return the sampling scheduler for the noise path and prediction type of `config`.

    dpm_solver: DPM-Solver++ (Lu et al. 2022), second order. It takes every sound combination, flow included, and every
    stock pipeline takes it.
    ddim: it knows no flow prediction. If the number of inference steps does not divide num_train_timesteps, each of its
    steps ends at another noise level than the next one starts from.
    ddpm: Algorithm 2 of Ho et al. 2020, with the learned variance if the objective has one. Fewer steps than in
    training are spaced evenly from the last timestep to the first, as in Nichol & Dhariwal 2021: diffusers adds noise
    in every step except at timestep 0, so that a sampling that ends at another timestep ends in noise.
    unclip: ddpm in the class whose ``step`` the pipelines of Kandinsky's priors call; it knows the cosine path only.

    clip_sample: x0 is in [-1, 1]; ddim and ddpm clip their estimate of it to that range. With `sampler.thresholding`
    every one of them limits it by dynamic thresholding instead.

    The config also holds keys that DPM-Solver does not use, for ``pipe.scheduler = X.from_config(
    pipe.scheduler.config)``: DDIM and DDPM then clip only if x0 is in [-1, 1], and PNDM takes the given steps.

    ValueError if the combination is unsound, as in training, or if what is not in [-1, 1] should be thresholded. Two
    limits of diffusers on the discrete paths:
    more inference steps than num_train_timesteps give NaN; and with a few odd numbers of steps (61, 103, 121, ...)
    there is one step too many, at timestep -1, and the samples' standard deviation is about 3 % off.
    """
    scheduler = _build(config, sampler, clip_sample)
    scheduler.register_to_config(clip_sample=clip_sample)
    if len(scheduler.compatibles) > 1:  # the config is for these too; a class on its own warns of unknown keys
        scheduler.register_to_config(skip_prk_steps=True)
    if sampler.thresholding is not None:
        if not clip_sample:
            raise ConfigError("sampler.thresholding: limits pixels; leave it out in this space.kind, or set pixel")
        scheduler.register_to_config(
            clip_sample=False,
            thresholding=True,
            dynamic_thresholding_ratio=sampler.thresholding,
            sample_max_value=NO_LIMIT,  # diffusers' default of 1 would be plain clipping
        )
    return scheduler


def _build(config: ObjectiveConfig, sampler: SamplerConfig, clip_sample: bool) -> Any:
    refuse_unsound(config)
    steps = config.num_train_timesteps
    if config.path == "flow":
        if sampler.kind != "dpm_solver":
            raise ValueError(f"sampler.kind {sampler.kind} knows no flow path; expected dpm_solver")
        return DPMSolverMultistepScheduler(
            num_train_timesteps=steps,
            prediction_type=config.prediction_type,
            use_flow_sigmas=True,
            flow_shift=1.0,
            final_sigmas_type="zero",
        )
    common: dict[str, Any] = {
        "num_train_timesteps": steps,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": "trailing",  # starts at the last timestep, as zero terminal SNR needs (Lin et al. 2024)
        "beta_schedule": "squaredcos_cap_v2",
    }
    if config.path in BETAS:
        first, last = (beta * 1000 / steps for beta in BETAS[config.path])
        common |= {"beta_schedule": config.path, "beta_start": first, "beta_end": last}
    if sampler.kind == "unclip":
        return UnCLIPScheduler(
            num_train_timesteps=steps, prediction_type=config.prediction_type, clip_sample=clip_sample
        )
    if sampler.kind == "ddim":
        return DDIMScheduler(**common, clip_sample=clip_sample)
    if sampler.kind == "ddpm":
        variance = sampler.variance_type if config.variational_weight is None else "learned_range"
        common["timestep_spacing"] = "linspace"
        return DDPMScheduler(**common, clip_sample=clip_sample, variance_type=variance)
    return DPMSolverMultistepScheduler(
        **common,
        final_sigmas_type="zero",
        # An error of the predicted noise becomes an error of x0, multiplied by sigma / alpha. At the end of the cosine
        # path that is 20,000: start where it is 164 (diffusers' advice; the linear path ends at 157).
        lambda_min_clipped=-5.1 if config.prediction_type == "epsilon" else -float("inf"),
    )


def schedule_of(scheduler: Any) -> tuple[Schedule, PredictionType]:
    """Return the noise path and the prediction type of a sampling scheduler of diffusers.

    Raises:
        ValueError: the prediction type is unknown here.

    """
    config = scheduler.config
    flow = bool(config.get("use_flow_sigmas")) or type(scheduler).__name__.startswith("FlowMatch")
    kind = config.get("prediction_type", "flow_prediction" if flow else "epsilon")
    if kind not in get_args(PredictionType):
        raise ValueError(f"the scheduler has prediction_type {kind!r}; known are {', '.join(get_args(PredictionType))}")
    steps = int(config.num_train_timesteps)
    return (FlowSchedule(steps) if flow else DiscreteSchedule(scheduler.betas.double())), cast(PredictionType, kind)
