"""An average of any length, after the training: a sum of stored ones (Karras et al. 2024, section 3.2, appendix C).

A power-function average is the weights over time tau, integrated with a profile ``p(tau) = (gamma + 1) tau**gamma /
t**(gamma + 1)``, 0 after t. So the sum of stored averages whose profiles sum up to another profile is the average with
that one: least squares between functions, in which no weight of the network occurs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.training.averages import gamma_of
from ldm.training.snapshots import Snapshot, read_tensors

Floats = NDArray[np.float64]
MAX_ERROR = 0.1
"""Relative error of a profile, root mean square. On a random walk the average was then off by at most 0.1 of its
distance from the nearest stored one with 8 snapshots or more of each length, by up to 0.6 with 4."""


def inner_products(t_a: Floats, gamma_a: Floats, t_b: Floats, gamma_b: Floats) -> Floats:
    """Return the integrals of ``p_a(tau) p_b(tau)`` over all tau; arguments broadcast (Karras et al. 2024, eq. 151)."""
    first = np.minimum(t_a, t_b)
    shares = (first / t_a) ** gamma_a * (first / t_b) ** gamma_b
    product: Floats = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shares / np.maximum(t_a, t_b)
    return product


def coefficients(t: Floats, gamma: Floats, t_wanted: float, gamma_wanted: float) -> tuple[Floats, float]:
    """Return the factors, (N,), of N stored averages whose sum is nearest to the wanted one, and the profile's error.

    t: steps taken. Those of a profile that is stored are 1 for it and 0 for all others. They sum to 1, so that weights
    that stand still stay what they are: networks here, unlike those of the paper, are not normalised (Algorithm 3). The
    error is the root mean square of the profiles' difference, relative to that of the wanted one.
    """
    wanted = np.array(t_wanted), np.array(gamma_wanted)
    a = inner_products(t[:, None], gamma[:, None], t, gamma)
    b = inner_products(t, gamma, *wanted)
    x, *_ = np.linalg.lstsq(a, b, rcond=None)  # two steps without one taken between them have the same profile
    x = x / x.sum()
    squared = inner_products(*wanted, *wanted)
    return x, float(np.sqrt(max(0.0, squared - 2 * x @ b + x @ a @ x) / squared))


def averaged_weights(snapshots: Sequence[Snapshot], sigma_rel: float, at_step: int | None = None) -> dict[str, Tensor]:
    """Return the average of length `sigma_rel` at step `at_step` of a snapshot, None: the newest; on the CPU.

    Parameters and buffers by their names in the trained module; sums are taken in float64 and rounded to each tensor's
    own type; integer buffers are the newest's. A stored average comes back as it was. Takes the memory of four copies.

    Raises:
        ValueError: there is no snapshot of `at_step` (a profile ends there with a jump, which no other has), they are
            of different networks, or represent the average's profile with an error of more than 10 %.

    """
    newest = max(snapshots, key=lambda snapshot: snapshot.global_step)
    times = {snapshot.global_step: snapshot.steps_taken for snapshot in snapshots}
    step = newest.global_step if at_step is None else at_step
    if step not in times:
        raise ValueError(f"at_step: got {step}; expected a step of a snapshot: {', '.join(map(str, sorted(times)))}")
    t = np.array([snapshot.steps_taken for snapshot in snapshots], np.float64)
    gamma = np.array([gamma_of(snapshot.sigma_rel) for snapshot in snapshots])
    x, error = coefficients(t, gamma, times[step], gamma_of(sigma_rel))
    if error > MAX_ERROR:
        stored = sorted({snapshot.sigma_rel for snapshot in snapshots})
        raise ValueError(
            f"sigma_rel: {sigma_rel} cannot be made of {len(snapshots)} snapshots of {stored}: its profile would be "
            f"{error:.1%} off, and {MAX_ERROR:.0%} is the most; choose one nearer to those, or train with a smaller "
            "snapshot_every_steps"
        )
    like = read_tensors(newest)
    sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
    for snapshot, factor in zip(snapshots, x, strict=True):
        # version 0.1.0 averaged parameters that are frozen now: they stood still
        tensors = {name: tensor for name, tensor in read_tensors(snapshot).items() if name not in newest.frozen}
        if {name: tensor.shape for name, tensor in tensors.items()} != {name: one.shape for name, one in like.items()}:
            raise ValueError(f"{snapshot.path} is of another network than {newest.path}; delete those of one of them")
        for name, tensor in tensors.items():
            sums[name].add_(tensor.double(), alpha=float(factor))
    floating = {name for name, tensor in like.items() if tensor.is_floating_point()}
    return {name: sums[name].to(tensor.dtype) if name in floating else tensor for name, tensor in like.items()}
