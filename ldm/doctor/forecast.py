"""A forecast of a run's cost on another GPU, from a description of it."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config import DoctorConfig
from ldm.doctor.cost import GIB, Cost, duration
from ldm.doctor.plan import Plan

UTILISATION = 0.2
"""Assumed share of a GPU's peak speed; 0.16 was measured for a model of Stable Diffusion's size on an H200."""
OPERATION_SECONDS = 24e-6
"""Time to launch one operation of the two passes on a GPU, in seconds, with a proportional share of the other work."""


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run on a GPU that the config describes."""

    step_seconds: float | None
    """None if the GPU's speed is not given."""
    hours: float | None
    fits: bool | None
    """True if the memory is enough; None if the GPU's memory is not given."""
    text: str


def forecast(cost: Cost, plan: Plan, config: DoctorConfig) -> Forecast:
    """Return the forecast of the run on the GPU that `config` describes.

    A step takes the longer of two times: its arithmetic at `UTILISATION` of the peak speed, and the launches of its
    operations. So small models are not faster on a faster GPU. Validations and checkpoints are not counted. If the run
    is limited by time, the number of steps is the one that this machine would take.
    """
    needed = cost.memory.total if cost.peak_bytes is None else cost.peak_bytes
    seconds = hours = fits = None
    said = []
    if config.gpu_tflops is not None:
        launches = cost.step_operations * OPERATION_SECONDS
        seconds = max(launches, cost.step_flops / (config.gpu_tflops * 1e12 * UTILISATION))
        limit = "busy with launches" if seconds == launches else f"used at {UTILISATION:.0%}"
        hours = plan.steps * seconds / 3600
        price = "" if config.price_per_hour is None else f", which cost {hours * config.price_per_hour:.2f}"
        said.append(
            f"a GPU of {config.gpu_tflops:g} TFLOP/s, {limit}: {seconds:.3g} s a step, "
            f"{plan.steps:,} steps in {duration(hours)}{price}"
        )
    if config.gpu_memory_gib is not None:
        fits = needed <= config.gpu_memory_gib * GIB
        remedy = "" if fits else "; use more loop.gradient_accumulation_steps, or loop.gradient_checkpointing"
        fit = "fits" if fits else "does not fit"
        said.append(f"{needed / GIB:.2f} GiB {fit} into its {config.gpu_memory_gib:g} GiB{remedy}")
    return Forecast(seconds, hours, fits, "; ".join(said))
