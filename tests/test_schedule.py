"""Noise paths and the prediction-type table, against closed forms and diffusers."""

import math
from dataclasses import replace
from itertools import pairwise, product
from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from ldm.config import ObjectiveConfig, PathName, PredictionType
from ldm.objectives.schedule import BETAS, build_schedule, recover, refuse_unsound, snr, target_coefficients

from .table import table

PATHS, TYPES = get_args(PathName), get_args(PredictionType)
DISCRETE = [path for path in PATHS if path != "flow"]


def schedule_of(path, zero_terminal_snr=False, steps=1000):
    # sample is the one prediction type that every path takes
    return build_schedule(ObjectiveConfig(path, "sample", steps, zero_terminal_snr))


def levels(path, u, zero_terminal_snr=False):
    """Alpha and sigma in float64 at noise levels u."""
    schedule = schedule_of(path, zero_terminal_snr)
    return schedule.alpha_sigma(schedule.timesteps(torch.tensor(u)), dtype=torch.float64)


def diffusers_of(path, zero_terminal_snr=False, steps=1000):
    first, last = (beta * 1000 / steps for beta in BETAS.get(path, (0, 0)))
    return DDPMScheduler(
        steps,
        first,
        last,
        path.replace("cosine", "squaredcos_cap_v2"),
        rescale_betas_zero_snr=zero_terminal_snr,
    )


@table(("path", "prediction_type"), [*product(PATHS, TYPES)])
def test_recover_inverts_the_target(path, prediction_type):
    alpha, sigma = levels(path, [[0.1], [0.5], [0.9]])
    x0, noise = torch.randn(2, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = target_coefficients(prediction_type, alpha, sigma)
    x0_again, noise_again = recover(a * x0 + b * noise, alpha * x0 + sigma * noise, prediction_type, alpha, sigma)
    # Float64 rounds at 1e-16; the worst amplification here is sigma / alpha < 100.
    torch.testing.assert_close(x0_again, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(noise_again, noise, rtol=0, atol=1e-12)


@table("prediction_type", TYPES)
def test_recover_is_singular_only_where_the_target_repeats_x_t(prediction_type):
    alpha, sigma = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])  # pure noise, pure data
    x0, noise = recover(torch.ones(2), torch.ones(2), prediction_type, alpha, sigma)
    solved = {"epsilon": [False, True], "sample": [True, False]}.get(prediction_type, [True, True])
    assert (x0.isfinite() & noise.isfinite()).tolist() == solved


@table(("path", "prediction_type"), [*product(PATHS, TYPES)])
def test_error_of_the_best_prediction_is_the_posterior_variance_of_the_target(path, prediction_type):
    """x0 ~ N(0, s^2): the target's part that x_t does not determine, by the closed form of each type."""
    s = 0.5
    alpha, sigma = levels(path, [0.05, 0.3, 0.6, 0.95])
    a, b = target_coefficients(prediction_type, alpha, sigma)
    variance = alpha**2 * s**2 + sigma**2
    covariance = a * alpha * s**2 + b * sigma
    left = a**2 * s**2 + b**2 - covariance**2 / variance
    expected = {
        "epsilon": alpha**2 * s**2 / variance,
        "sample": sigma**2 * s**2 / variance,
        "v_prediction": (alpha**2 + sigma**2) ** 2 * s**2 / variance,
        "flow_prediction": (alpha + sigma) ** 2 * s**2 / variance,
    }
    torch.testing.assert_close(left, expected[prediction_type], rtol=1e-9, atol=1e-12)


@table("path", DISCRETE)
def test_noisy_latents_and_velocity_equal_diffusers(path):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 50, 16, generator=generator)
    timesteps = torch.randint(1000, (50,), generator=generator)
    alpha, sigma = (level[:, None] for level in schedule_of(path).alpha_sigma(timesteps))
    a, b = target_coefficients("v_prediction", alpha, sigma)
    reference = diffusers_of(path)
    # diffusers multiplies up to 1000 float32 factors, 6e-8 each: alpha is off by some 1e-5.
    torch.testing.assert_close(alpha * x0 + sigma * noise, reference.add_noise(x0, noise, timesteps), rtol=0, atol=1e-4)
    torch.testing.assert_close(a * x0 + b * noise, reference.get_velocity(x0, noise, timesteps), rtol=0, atol=1e-4)


@table(("path", "rescaled", "steps"), [*product(DISCRETE, (False, True), (1000, 250))])
def test_alphas_cumprod_equal_diffusers(path, rescaled, steps):
    ours = schedule_of(path, rescaled, steps).alphas_cumprod
    theirs = diffusers_of(path, rescaled, steps).alphas_cumprod.double()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # float32 products, as above


@table(("path", "rescaled"), [*product(DISCRETE, (False, True))])
def test_one_step_transitions_chain_to_the_marginal(path, rescaled):
    """q(x_t | x_{t-1}) applied t times to x0 = 1 has mean alpha and variance sigma^2."""
    schedule = schedule_of(path, rescaled)
    alpha, sigma = schedule.alpha_sigma(torch.arange(1000), dtype=torch.float64)
    mean, variance = 1.0, 0.0
    for step, beta in enumerate(schedule.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert mean == pytest.approx(alpha[step].item(), abs=1e-12)
        assert variance == pytest.approx(sigma[step].item() ** 2, abs=1e-12)


@table("path", DISCRETE)
def test_zero_terminal_snr_is_exact_and_keeps_the_first_step(path):
    alpha, sigma = levels(path, [0.0, 1.0], zero_terminal_snr=True)
    assert (alpha[-1], sigma[-1]) == (0, 1)
    torch.testing.assert_close(alpha[0], levels(path, [0.0])[0][0], rtol=1e-12, atol=0)


@table(("path", "rescaled"), [*product(DISCRETE, (False, True)), ("flow", False)])
def test_noise_grows_along_every_path(path, rescaled):
    alpha, sigma = levels(path, torch.linspace(0.0005, 0.9995, 1000).tolist(), rescaled)
    assert (snr(alpha, sigma).diff() < 0).all()


def test_fewer_steps_end_at_the_same_noise():
    """Betas scale with 1000 / T, so that log alphas_cumprod = -sum(beta) hardly depends on T."""
    for path in BETAS:
        coarse, fine = (schedule_of(path, steps=steps).alphas_cumprod[-1].log() for steps in (500, 2000))
        assert coarse == pytest.approx(fine.item(), rel=0.02)  # the next order, sum(beta^2) / 2


def test_uniform_noise_levels_make_every_discrete_step_equally_likely():
    timesteps = schedule_of("linear", steps=50).timesteps((torch.arange(5000) + 0.5) / 5000)
    assert timesteps.dtype == torch.int64
    assert timesteps.bincount().tolist() == [100] * 50


@table("steps", [21, 999, 1000, 4000])
def test_the_ends_of_u_are_the_first_and_last_step(steps):
    below_one = 1 - 2**-24
    assert schedule_of("linear", steps=steps).timesteps(torch.tensor([0, below_one, 1])).tolist() == [
        0,
        steps - 1,
        steps - 1,
    ]


def test_the_flow_path_is_a_straight_line_over_1000_t():
    schedule = schedule_of("flow")
    timesteps = schedule.timesteps(torch.tensor([0.0, 0.25, 1.0]))
    assert (timesteps.dtype, timesteps.tolist()) == (torch.float32, [0, 250, 1000])
    alpha, sigma = schedule.alpha_sigma(timesteps)
    assert (alpha.tolist(), sigma.tolist()) == ([1, 0.75, 0], [0, 0.25, 1])


@table(("path", "bits"), [("linear", 2.91e-5), ("scaled_linear", 3.37e-3), ("cosine", 1.75e-9), ("flow", 0)])
def test_each_path_ends_in_the_noise_that_sampling_starts_from(path, bits):
    """KL(q(x_T | x0) || N(0, I)), in bits per dimension of x0 of RMS 1: L_T of Ho et al. 2020, eq. 5.

    -log2(1 - alphas_cumprod_T) / 2; section 4 reports about 1e-5 bits for linear.
    """

    def end(**changes):
        alpha, sigma = levels(path, 1.0, **changes)
        return float(kl_divergence(Normal(alpha, sigma), Normal(0 * alpha, 1))) / math.log(2)

    assert end() == pytest.approx(bits, rel=2e-3)
    if path != "flow":
        assert end(zero_terminal_snr=True) == 0


def flow_error(order, steps, prediction_type, s=0.5, first=0.95, last=0.05):
    """Error of Euler's or Heun's method on d x_t / dt = noise - x0 for x0 ~ N(0, s^2), by `recover`."""
    schedule = schedule_of("flow")

    def std(t):
        return math.sqrt((1 - t) ** 2 * s**2 + t**2)

    def slope(x_t, t):
        alpha, sigma = schedule.alpha_sigma(1000 * t, dtype=torch.float64)
        a, b = target_coefficients(prediction_type, alpha, sigma)
        best = (a * alpha * s**2 + b * sigma) / std(t) ** 2 * x_t  # E[target | x_t]
        x0, noise = recover(best, x_t, prediction_type, alpha, sigma)
        return noise - x0

    times = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    x_t = torch.tensor(std(first), dtype=torch.float64)
    for t, t_next in pairwise(times):
        k = slope(x_t, t)
        if order == 2:
            k = (k + slope(x_t + (t_next - t) * k, t_next)) / 2
        x_t = x_t + (t_next - t) * k
    return abs(x_t.item() - std(last))  # the exact flow keeps x_t / std(t)


@table(("order", "prediction_type"), [*product((1, 2), TYPES)])
def test_doubling_steps_halves_the_error_of_euler_and_quarters_that_of_heun(order, prediction_type):
    ratio = flow_error(order, 100, prediction_type) / flow_error(order, 200, prediction_type)
    assert ratio == pytest.approx(2**order, rel=0.05)  # the next order is 1 / 100 of this one, times a few


@table(
    ("changes", "reason"),
    [
        (
            {"prediction_type": "epsilon", "zero_terminal_snr": True},
            "divides by 0; use v_prediction or sample",
        ),
        ({"path": "flow", "prediction_type": "epsilon"}, "divides by 0; use flow_prediction or sample"),
        (
            {"path": "flow", "prediction_type": "v_prediction"},
            "does not hold on the flow path; use flow_pred",
        ),
        ({"path": "linear", "prediction_type": "flow_prediction"}, "no diffusers scheduler .*use path: flow"),
        ({"path": "flow", "zero_terminal_snr": True}, "ends in pure noise already; leave it out"),
        ({"path": "flow", "num_train_timesteps": 99}, "num_train_timesteps 99: .*at least 100"),
        ({"path": "linear", "num_train_timesteps": 20}, "num_train_timesteps 20: .*at least 21"),
        ({"path": "scaled_linear", "num_train_timesteps": 12}, "num_train_timesteps 12: .*at least 13"),
        ({"path": "cosine", "num_train_timesteps": 0}, "num_train_timesteps 0: use at least 1"),
        (
            {"path": "cosine", "num_train_timesteps": 1, "zero_terminal_snr": True},
            "timesteps 1: .* 2 with zero",
        ),
    ],
)
def test_unsound_combinations_are_refused_with_reason_and_remedy(changes, reason):
    config = replace(ObjectiveConfig(prediction_type="sample"), **changes)
    with pytest.raises(ValueError, match=f"(?s)objective.*{reason}"):
        build_schedule(config)


def test_the_fewest_steps_that_are_allowed_have_proper_betas():
    for path, steps in {"linear": 21, "scaled_linear": 13, "cosine": 1}.items():
        betas = schedule_of(path, steps=steps).betas
        assert ((betas > 0) & (betas < 1)).all()


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)zero_terminal_snr.*\nobjective\.prediction_type epsilon"):
        refuse_unsound(ObjectiveConfig("flow", "epsilon", zero_terminal_snr=True))
