"""The sampling scheduler, end to end: a perfect network for known data must sample that data."""

from itertools import product
from typing import get_args

import pytest
import torch

from ldm.config import ObjectiveConfig, PathName, PredictionType
from ldm.models.scheduler import build_scheduler
from ldm.objectives.denoising import Objective
from ldm.objectives.schedule import target_coefficients
from tests.test_objective import SOUND

from .table import table

MEAN, S = 0.7, 0.5  # of the data


def sample(config, x_T, num_inference_steps):  # noqa: N803
    """Return the samples, and the alpha and sigma they start from, of the best network for N(MEAN, S^2)."""
    schedule, scheduler = Objective(config).schedule, build_scheduler(config)
    scheduler.set_timesteps(num_inference_steps)
    x_t = x_T * scheduler.init_noise_sigma
    start = schedule.alpha_sigma(scheduler.timesteps[0])
    for timestep in scheduler.timesteps:
        alpha, sigma = schedule.alpha_sigma(timestep)
        a, b = target_coefficients(config.prediction_type, alpha, sigma)
        residual = (x_t - alpha * MEAN) / (alpha**2 * S**2 + sigma**2)
        x0, noise = MEAN + alpha * S**2 * residual, sigma * residual
        model_output = a * x0 + b * noise
        x_t = scheduler.step(model_output, timestep, scheduler.scale_model_input(x_t, timestep)).prev_sample
    return x_t, *start


@pytest.mark.slow
@table(("path", "prediction_type", "rescaled"), SOUND)
def test_a_perfect_network_samples_the_data(path, prediction_type, rescaled):
    """Everything is affine, so two starting points give the mean and the standard deviation exactly."""
    config = ObjectiveConfig(path, prediction_type, zero_terminal_snr=rescaled)
    (at_0, at_1), alpha, sigma = sample(config, torch.tensor([0.0, 1.0]), 1000)
    gain = S / (alpha**2 * S**2 + sigma**2).sqrt()
    # The ODE carries x_T to MEAN + gain (x_T - alpha MEAN): the data, up to what x_T still knows of it. What
    # is left is the last step, which returns a mean (0.0017 S is missing), and on the flow path the network's
    # time, which diffusers rounds down by up to 1 / 1000.
    tolerance = 0.01 if path == "flow" else 0.004
    torch.testing.assert_close(at_1 - at_0, gain, rtol=tolerance, atol=0)
    torch.testing.assert_close(at_0, MEAN - gain * alpha * MEAN, rtol=0, atol=tolerance * MEAN)


@table(("path", "prediction_type", "rescaled"), SOUND)
def test_twenty_steps_come_close(path, prediction_type, rescaled):
    """Ten percent: the mean that the last step returns has lost 9 % of S on the scaled linear path."""
    config = ObjectiveConfig(path, prediction_type, zero_terminal_snr=rescaled)
    (at_0, at_1), _, _ = sample(config, torch.tensor([0.0, 1.0]), 20)
    assert at_1 - at_0 == pytest.approx(S, rel=0.1)
    assert at_0 == pytest.approx(MEAN, rel=0.1)


@table(("path", "rescaled", "steps"), [*product(("linear", "scaled_linear", "cosine"), (False, True), (1000, 100))])
def test_the_scheduler_has_the_noise_levels_of_training(path, rescaled, steps):
    config = ObjectiveConfig(path, "v_prediction", steps, rescaled)
    alpha, _ = Objective(config).schedule.alpha_sigma(torch.arange(steps))
    # float32 products on one side; 2^-24 in place of 0 at the end, so that diffusers' sigma stays finite
    torch.testing.assert_close(build_scheduler(config).alphas_cumprod, alpha.square(), rtol=1e-4, atol=1e-6)


@table(("path", "prediction_type", "rescaled"), SOUND)
def test_sampling_starts_where_noise_and_training_meet(path, prediction_type, rescaled):
    scheduler = build_scheduler(ObjectiveConfig(path, prediction_type, zero_terminal_snr=rescaled))
    scheduler.set_timesteps(20)
    # epsilon on the cosine path leaves out its last steps, where x0 = (x_t - sigma noise) / alpha explodes
    first = 995 if (path, prediction_type) == ("cosine", "epsilon") else 999
    assert scheduler.timesteps[0] == first


@table("path", ["scaled_linear", "flow"])
def test_usual_numbers_of_steps_are_kept(path):
    scheduler = build_scheduler(ObjectiveConfig(path, "sample"))
    for number in (*range(1, 61), 75, 80, 100, 150, 200, 250, 500, 1000):
        scheduler.set_timesteps(number)
        assert len(scheduler.timesteps) == number
        assert scheduler.timesteps.min() >= 0


@table(
    ("path", "prediction_type", "rescaled"),
    [*product(get_args(PathName), get_args(PredictionType), (False, True))],
)
def test_what_cannot_be_trained_cannot_be_sampled(path, prediction_type, rescaled):
    config = ObjectiveConfig(path, prediction_type, zero_terminal_snr=rescaled)
    if (path, prediction_type, rescaled) in SOUND:
        assert build_scheduler(config).config.prediction_type == prediction_type
    else:
        with pytest.raises(ValueError, match=r"use|leave it out"):
            build_scheduler(config)
