"""The precision that a run computes in: the config's, the checkpoint's, the launcher's or the machine's own."""

from __future__ import annotations

import functools
import logging
import math
import os
import time

import torch

log = logging.getLogger(__name__)
LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""Always set by ``accelerate launch``; its default, "no", cannot be told from ``--mixed_precision no``."""


def chosen_precision(wanted: str, recorded: str | None) -> str:
    """Return "no", "bf16" or "fp16" for ``loop.mixed_precision: wanted``.

    A precision that the config names counts. "auto" is what the checkpoint was trained in (`recorded`; a measurement
    would choose another one on a busy machine), else what ``accelerate launch`` asks for, else `native_precision`.
    What ``accelerate launch`` asks for in vain is a warning.
    """
    launched = os.environ.get(LAUNCHED, "no")
    asked = None if launched == "no" else launched
    if wanted != "auto":
        chosen, why = wanted, f"the config says loop.mixed_precision: {wanted}"
    elif recorded is not None:
        chosen, why = recorded, f"the checkpoint was trained in {recorded}"
    elif asked in ("bf16", "fp16"):
        log.info("loop.mixed_precision auto: %s, as accelerate launch asks for", asked)
        return asked
    else:
        chosen, why = native_precision(), "it is none that a run computes in"
    if asked not in (None, chosen):
        log.warning("accelerate launch --mixed_precision %s is not followed: %s; %s is used", asked, why, chosen)
    return chosen


def native_precision() -> str:
    """Return bf16 where the device computes faster with it, else "no" (float32).

    A processor is asked and not believed: with AVX2 alone convolutions in bf16 ran ten times slower than in float32,
    with AVX512-BF16 on one maker's at 1.5 times the speed and on another's at 0.65.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    able = torch.cpu.get_capabilities()
    return "bf16" if (able.get("avx512_bf16") or able.get("amx_bf16")) and bf16_speed() > 1.2 else "no"


@functools.cache
def bf16_speed() -> float:
    """Return the speed of this processor's matrix products in bf16 over that in float32, measured once."""
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(7):  # in turn, and the best of each: other processes slow down some of them
        for dtype in seconds:
            matrix = torch.ones(1024, 1024, dtype=dtype)
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return seconds[torch.float32] / seconds[torch.bfloat16]
