"""The scheduler that samples what `ldm.objectives.denoising` trained."""

from __future__ import annotations

from typing import Any, cast, get_args

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from ldm.config import ObjectiveConfig, PredictionType, SamplerConfig
from ldm.objectives.schedule import BETAS, DiscreteSchedule, FlowSchedule, Schedule, refuse_unsound

DPM_SOLVER = SamplerConfig()


def build_scheduler(config: ObjectiveConfig, sampler: SamplerConfig = DPM_SOLVER, clip_sample: bool = False) -> Any:
    """Return the sampling scheduler of the noise path and prediction type that config trains.

    dpm_solver: DPM-Solver++ (Lu et al. 2022), second order: one class for every sound combination, flow included, and
    any stock pipeline takes it. DDIM knows no flow prediction, and where the number of inference steps does not
    divide num_train_timesteps each of its steps ends at another noise level than the next one starts from. ddpm:
    Algorithm 2 of Ho et al. 2020, with the learned variance if the objective has one; fewer steps than in training are
    spaced evenly from the last timestep to the first, as Nichol & Dhariwal 2021 do: diffusers adds noise in every step
    but that of timestep 0, so that a sampling that ends elsewhere ends in noise.

    clip_sample: x0 is in [-1, 1], and what ddim and ddpm think of it on the way is clipped to that.

    The config also has what DPM-Solver does not know and hands on: with ``pipe.scheduler = X.from_config(
    pipe.scheduler.config)`` DDIM and DDPM clip only where x0 is in [-1, 1], and PNDM takes as many steps as it is told.

    ValueError if the combination is unsound, as in training. Two limits of diffusers on the discrete paths:
    more inference steps than num_train_timesteps give NaN, and a few odd numbers of them (61, 103, 121, ...)
    get one step too many, at timestep -1, and samples whose standard deviation is some 3 % off.
    """
    scheduler = _build(config, sampler, clip_sample)
    scheduler.register_to_config(clip_sample=clip_sample, skip_prk_steps=True)
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
        "timestep_spacing": "trailing",  # from the last step on, as zero terminal SNR needs (Lin et al. 2024)
        "beta_schedule": "squaredcos_cap_v2",
    }
    if config.path in BETAS:
        first, last = (beta * 1000 / steps for beta in BETAS[config.path])
        common |= {"beta_schedule": config.path, "beta_start": first, "beta_end": last}
    if sampler.kind == "ddim":
        return DDIMScheduler(**common, clip_sample=clip_sample)
    if sampler.kind == "ddpm":
        variance = sampler.variance_type if config.variational_weight is None else "learned_range"
        common["timestep_spacing"] = "linspace"
        return DDPMScheduler(**common, clip_sample=clip_sample, variance_type=variance)
    return DPMSolverMultistepScheduler(
        **common,
        final_sigmas_type="zero",
        # An error of the predicted noise is one of x0 times sigma / alpha, which is 20,000 at the end of the
        # cosine path: start where it is 164 (diffusers' advice; the linear path ends at 157).
        lambda_min_clipped=-5.1 if config.prediction_type == "epsilon" else -float("inf"),
    )


def schedule_of(scheduler: Any) -> tuple[Schedule, PredictionType]:
    """Return the noise path that a sampling scheduler of diffusers was made for, and what its network predicts.

    Raises:
        ValueError: it predicts what none of ours does.

    """
    config = scheduler.config
    flow = bool(config.get("use_flow_sigmas")) or type(scheduler).__name__.startswith("FlowMatch")
    kind = config.get("prediction_type", "flow_prediction" if flow else "epsilon")
    if kind not in get_args(PredictionType):
        raise ValueError(f"the scheduler has prediction_type {kind!r}; known are {', '.join(get_args(PredictionType))}")
    steps = int(config.num_train_timesteps)
    return (FlowSchedule(steps) if flow else DiscreteSchedule(scheduler.betas.double())), cast(PredictionType, kind)
