"""What a run would cost on a GPU that is described and not here."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config import DoctorConfig
from ldm.doctor.cost import GIB, Cost, duration
from ldm.doctor.plan import Plan

UTILISATION = 0.2
"""Share of its peak speed that a GPU is reckoned to reach; 0.16 was measured, of Stable Diffusion's size on an H200."""
OPERATION_SECONDS = 24e-6
"""What a GPU's processor needs to launch one operation of the two passes, with a step's other work in proportion."""


@dataclass(frozen=True)
class Forecast:
    """A run on a machine that is described and not here."""

    step_seconds: float | None
    """None: its speed is not told."""
    hours: float | None
    fits: bool | None
    """None: its memory is not told."""
    text: str


def forecast(cost: Cost, plan: Plan, config: DoctorConfig) -> Forecast:
    """Return what the run would be on the GPU that `config` describes.

    A step takes its arithmetic at `UTILISATION` of the peak speed, or its launches, whichever is longer: small models
    are no faster on a faster GPU. Of the steps alone: validation and checkpoints are not counted. A run that is limited
    by time is reckoned with the steps that this machine would take.
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
        remedy = "" if fits else "; more loop.gradient_accumulation_steps, or loop.gradient_checkpointing"
        fit = "fits" if fits else "does not fit"
        said.append(f"{needed / GIB:.2f} GiB {fit} into its {config.gpu_memory_gib:g} GiB{remedy}")
    return Forecast(seconds, hours, fits, "; ".join(said))
