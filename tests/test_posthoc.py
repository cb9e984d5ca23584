"""Averages made afterwards: against integrals by brute force, and against averages that were tracked all along."""

from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.training.averages import Average, gamma_of, power_function
from ldm.training.posthoc import MAX_ERROR, averaged_weights, coefficients, inner_products
from ldm.training.snapshots import Snapshot

from .table import table

STORED = (0.05, 0.1)
STEPS = 256


def profile(tau, t, gamma):
    return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)


def walk(steps=STEPS, size=200):
    """Weights over a training: a start, and independent steps from there."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=draw, dtype=torch.float64)
    return start + (0.02 * torch.randn(steps, size, generator=draw, dtype=torch.float64)).cumsum(0)


def tracked(weights, sigma_rel):
    """Return the average after each step, as training tracks it."""
    module = nn.Linear(weights.shape[1], 1, bias=False, dtype=torch.float64)
    average, found = Average(module, power_function(sigma_rel)), []
    for step, now in enumerate(weights):
        with torch.no_grad():
            module.weight.copy_(now[None])
        average.update(step)
        found.append(average.module.weight[0].clone())
    return torch.stack(found)


@cache
def walked(sigma_rel):
    return tracked(walk(), sigma_rel)


def snapshots(folder, count, weights=None, dtype=torch.float64):
    """Write `count` snapshots of each stored average, evenly over the training."""
    found = []
    for sigma_rel in STORED:
        average = walked(sigma_rel) if weights is None else tracked(weights, sigma_rel)
        for step in range(len(average) // count, len(average) + 1, len(average) // count):
            path = folder / f"{step}-{sigma_rel}.safetensors"
            save_file({"w": average[step - 1].to(dtype), "steps": torch.tensor(step)}, path)
            found.append(Snapshot(path, step, step, sigma_rel))
    return found


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_inner_products_are_the_integrals_of_the_profiles():
    tau = (np.arange(300_000) + 0.5) / 100_000  # midpoints, the jumps between them: an error of the spacing squared
    cases = [(1.0, 0.05, 3.0, 0.1), (3.0, 0.05, 1.0, 0.1), (2.0, 0.25, 2.0, 0.02), (2.5, 0.28, 2.6, 0.28)]
    for t_a, sigma_a, t_b, sigma_b in cases:
        gammas = gamma_of(sigma_a), gamma_of(sigma_b)
        integral = (profile(tau, t_a, gammas[0]) * profile(tau, t_b, gammas[1])).mean() * 3
        arguments = (np.array(value) for value in (t_a, gammas[0], t_b, gammas[1]))
        assert inner_products(*arguments) == pytest.approx(integral, rel=1e-6)


def test_factors_and_error_are_those_of_sampled_profiles():
    t = np.repeat([25.0, 50, 75, 100], 2)
    gamma = np.tile([gamma_of(value) for value in STORED], 4)
    tau = (np.arange(20_000) + 0.5) / 20_000 * 100
    stored = np.stack([profile(tau, *one) for one in zip(t, gamma, strict=True)], 1)
    for sigma_rel in (0.03, 0.07, 0.2):
        x, error = coefficients(t, gamma, 100.0, gamma_of(sigma_rel))
        wanted = profile(tau, 100.0, gamma_of(sigma_rel))
        expected, *_ = np.linalg.lstsq(stored, wanted, rcond=None)
        np.testing.assert_allclose(x, expected / expected.sum(), atol=1e-4)
        mixed = stored @ x
        brute = np.sqrt(((mixed - wanted) ** 2).mean() / (wanted**2).mean())
        assert error == pytest.approx(brute, rel=1e-3)
        assert x.sum() == pytest.approx(1, abs=1e-12)


@table(("count", "most"), [(8, 1e-2), (32, 3e-4), (64, 3e-5)])
def test_a_random_walk_is_reconstructed_better_with_more_snapshots(count, most, tmp_path):
    """Measured, relative to the weights: see `most`; from the nearest stored average it is 0.9 to 6 percent."""
    stored = snapshots(tmp_path, count)
    for sigma_rel in (0.04, 0.07, 0.15, 0.2):
        expected = walked(sigma_rel)[-1]
        assert relative_error(averaged_weights(stored, sigma_rel)["w"], expected) < most
        assert relative_error(walked(0.05)[-1], expected) > 8e-3


def test_a_stored_average_comes_back_to_the_bit(tmp_path):
    stored = snapshots(tmp_path, 64, dtype=torch.float32)
    for sigma_rel in STORED:
        for step in (128, STEPS):
            found = averaged_weights(stored, sigma_rel, step)
            assert found["w"].dtype == torch.float32
            assert torch.equal(found["w"], walked(sigma_rel)[step - 1].float())


def test_the_step_of_any_snapshot_can_be_asked_for(tmp_path):
    expected = walked(0.08)[160 - 1]
    assert relative_error(averaged_weights(snapshots(tmp_path, 64), 0.08, 160)["w"], expected) < 1e-4


def test_weights_that_stand_still_stay_what_they_are(tmp_path):
    still = torch.full((64, 3), 7.0, dtype=torch.float64)
    found = averaged_weights(snapshots(tmp_path, 8, still, torch.float32), 0.2)  # its profile is 8 % off
    assert torch.equal(found["w"], torch.full((3,), 7.0))
    assert found["steps"].dtype == torch.int64
    assert found["steps"] == 64


def test_time_is_counted_in_steps_that_changed_the_weights(tmp_path):
    """The last 8 steps were skipped: the averages did not move, and two snapshots are alike."""
    stored = snapshots(tmp_path, 64)
    again = [Snapshot(one.path, STEPS + 8, STEPS, one.sigma_rel) for one in stored if one.global_step == STEPS]
    assert relative_error(averaged_weights([*stored, *again], 0.08)["w"], walked(0.08)[-1]) < 1e-5


def test_what_snapshots_cannot_represent_is_refused(tmp_path):
    stored = snapshots(tmp_path, 4)
    with pytest.raises(ValueError, match=r"sigma_rel: 0\.01 cannot be made of 8 snapshots of \[0\.05, 0\.1\].*smaller"):
        averaged_weights(stored, 0.01)
    with pytest.raises(ValueError, match=r"sigma_rel: got 0\.3; expected a number above 0, to 0\.28"):
        averaged_weights(stored, 0.3)
    for step in (0, 65, STEPS + 1):
        with pytest.raises(ValueError, match=f"at_step: got {step}; expected a step of a snapshot: 64, 128, 192, 256"):
            averaged_weights(stored, 0.05, step)
    save_file({"w": torch.zeros(3)}, stored[0].path)
    with pytest.raises(ValueError, match="is of another network than"):
        averaged_weights(stored, 0.05)


def test_fifty_snapshots_reach_from_a_third_of_the_shortest_to_the_longest():
    t = np.repeat(np.arange(1.0, 51), 2)
    gamma = np.tile([gamma_of(value) for value in STORED], 50)
    for sigma_rel in (0.017, 0.02, 0.05, 0.1, 0.2, 0.28):
        assert coefficients(t, gamma, 50.0, gamma_of(sigma_rel))[1] < MAX_ERROR, sigma_rel
