"""What the doctor is told; see `ldm.doctor.examination`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DoctorConfig:
    """Only look whether this config can learn and what it will cost (OUTPUT_DIR/doctor), and train nothing."""

    price_per_hour: float | None = None
    """Of the machine, in any currency: of the other one if `gpu_tflops` describes it, else of this one."""
    gpu_tflops: float | None = None
    """Peak speed of another machine's GPU in TFLOP/s, at the precision that it will train in."""
    gpu_memory_gib: float | None = None
    """Memory of another machine's GPU in GiB."""
