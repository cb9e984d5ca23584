"""The machine: its hardware, cores and memory, and the precision that it computes fastest in."""

from __future__ import annotations

import functools
import math
import os
import platform
import time

import torch


def hardware() -> str:
    """Return the accelerators, or the processor and its number of threads, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} threads, {torch.cpu.get_capabilities().get('cpu_name') or platform.processor()}"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def memory_bytes() -> int:
    """Return the size of this machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def native_precision() -> str:
    """Return "bf16" where the device computes faster with it, else "no" (float32).

    A processor's speed is measured, since its features do not tell: with AVX2 alone, convolutions in bf16 ran ten times
    slower than in float32; with AVX512-BF16, at 1.5 times the speed on one maker's processor and 0.65 on another's.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    able = torch.cpu.get_capabilities()
    return "bf16" if (able.get("avx512_bf16") or able.get("amx_bf16")) and bf16_speed() > 1.2 else "no"


@functools.cache
def bf16_speed() -> float:
    """Return the speed of this processor's matrix products in bf16, relative to float32; measured once."""
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(7):  # in turn, and the best of each: other processes slow down some of them
        for dtype in seconds:
            matrix = torch.ones(1024, 1024, dtype=dtype)
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return seconds[torch.float32] / seconds[torch.bfloat16]
