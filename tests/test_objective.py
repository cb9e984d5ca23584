"""The loss, held against Gaussian data, whose best prediction is known in closed form."""

import warnings
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from torch.distributions import Normal

from ldm.config import ObjectiveConfig, PathName, PredictionType
from ldm.objectives.denoising import Objective
from ldm.objectives.schedule import recover, snr, target_coefficients

from .table import table

S = 0.5  # standard deviation of the data
SOUND = [
    *product(("linear", "scaled_linear", "cosine"), ("epsilon", "sample", "v_prediction"), (False,)),
    *product(("linear", "scaled_linear", "cosine"), ("sample", "v_prediction"), (True,)),
    *product(("flow",), ("sample", "flow_prediction"), (False,)),
]
sound = table("config", [ObjectiveConfig(p, t, zero_terminal_snr=z) for p, t, z in SOUND])


def best_predictor(config):
    """E[target | x_t] for x0 ~ N(0, S^2), the regression of the target on x_t, from a network's inputs."""
    schedule = Objective(config).schedule

    def predict(x_t, timesteps):
        alpha, sigma = (level[:, None] for level in schedule.alpha_sigma(timesteps))
        a, b = target_coefficients(config.prediction_type, alpha, sigma)
        return (a * alpha * S**2 + b * sigma) / (alpha**2 * S**2 + sigma**2) * x_t

    return predict


def posterior_variance(config, u):
    """Mean squared error of the best predictor at noise levels u, in closed form."""
    schedule = Objective(config).schedule
    alpha, sigma = schedule.alpha_sigma(schedule.timesteps(u))
    numerator = {"epsilon": alpha**2, "sample": sigma**2}.get(config.prediction_type, torch.ones(()))
    return numerator * S**2 / (alpha**2 * S**2 + sigma**2)


def loss(objective, predict, x0, draws):
    """As training: random noise and levels, by the weight of the density."""
    noise, levels = objective.draw(x0, draws)
    return objective.density.weight(levels) * objective.loss_at(predict, x0, noise, levels)


def generators(count, first_seed=0):
    return [torch.Generator().manual_seed(first_seed + i) for i in range(count)]


@sound
def test_loss_at_optimum_is_the_posterior_variance(config):
    # Four points with the second moments of the Gaussians, exactly: no sampling error.
    x0, noise = torch.tensor([[S, S, -S, -S]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    for u in (0.01, 0.3, 0.7, 0.99):
        loss = Objective(config).loss_at(best_predictor(config), x0, noise, u)
        # float32 rounding of squared differences of numbers near 1
        torch.testing.assert_close(loss, posterior_variance(config, torch.tensor([u])), rtol=1e-4, atol=1e-6)


@table(
    "config",
    [
        ObjectiveConfig("scaled_linear", "epsilon"),
        ObjectiveConfig("cosine", "v_prediction", timestep_density="logit_normal", logit_mean=-1, logit_std=0.7),
        ObjectiveConfig("flow", "flow_prediction"),
        ObjectiveConfig("flow", "sample", timestep_density="logit_normal", logit_mean=0.5, logit_std=1.5),
    ],
)
def test_mean_loss_at_optimum_is_the_posterior_variance_under_the_density(config):
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    if config.timestep_density == "logit_normal":
        grid = Normal(config.logit_mean, config.logit_std).icdf(grid).sigmoid()
    expected = posterior_variance(config, grid.float()).mean()

    x0 = S * torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    losses = loss(Objective(config), best_predictor(config), x0, generators(2000, first_seed=100))
    assert abs(losses.mean() - expected) < 4 * losses.std() / 2000**0.5  # 4 standard errors


def test_the_logit_of_the_time_is_normal():
    config = ObjectiveConfig("flow", "flow_prediction", timestep_density="logit_normal", logit_mean=0.5, logit_std=0.8)
    times = []

    def predict(x_t, timesteps):
        times.append(timesteps / 1000)
        return x_t

    loss(Objective(config), predict, torch.zeros(4000, 1), generators(4000))
    logit = times[0].logit()
    assert abs(logit.mean() - 0.5) < 4 * 0.8 / 4000**0.5  # 4 standard errors of a mean and of a deviation
    assert abs(logit.std() - 0.8) < 4 * 0.8 / 8000**0.5


def test_each_sample_draws_its_time_and_then_its_noise_from_its_own_generator():
    objective = Objective(ObjectiveConfig("flow", "flow_prediction"))
    x0 = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(5))
    again = generators(3)
    drawn = [(torch.rand((), generator=g), torch.randn(2, 4, generator=g)) for g in again]
    u, noise = (torch.stack(column) for column in zip(*drawn, strict=True))
    expected = objective.loss_at(lambda x_t, timesteps: x_t, x0, noise, u)
    assert torch.equal(loss(objective, lambda x_t, timesteps: x_t, x0, generators(3)), expected)


def test_loss_of_a_sample_does_not_depend_on_its_batch_mates():
    objective = Objective(ObjectiveConfig("cosine", "v_prediction", min_snr_gamma=5, timestep_density="logit_normal"))
    x0 = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))

    def predict(x_t, timesteps):
        return x_t * (timesteps / 1000)[:, None, None]

    def losses(indices):
        return loss(objective, predict, x0[indices], [generators(6)[i] for i in indices])

    whole = losses([0, 1, 2, 3, 4, 5])
    assert torch.equal(torch.cat([losses([0, 1]), losses([2, 3, 4, 5])]), whole)
    assert torch.equal(losses([3, 5, 0, 2, 1, 4]), whole[[3, 5, 0, 2, 1, 4]])


@table(("path", "dtype"), [("scaled_linear", torch.int64), ("flow", torch.float32)])
def test_the_network_gets_float32_latents_and_the_timesteps_of_its_path(path, dtype):
    def predict(x_t, timesteps):
        assert x_t.dtype == torch.float32
        assert timesteps.dtype == dtype
        assert timesteps.tolist() == [250, 250]
        return x_t

    Objective(ObjectiveConfig(path, "sample")).loss_at(predict, torch.zeros(2, 3), torch.zeros(2, 3), 0.25)


def test_bf16_latents_and_outputs_give_a_float32_loss_of_float32_noise():
    objective = Objective(ObjectiveConfig("linear", "v_prediction"))
    x0 = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()

    def losses(x0, output_dtype):
        return loss(objective, lambda x_t, timesteps: torch.zeros_like(x_t, dtype=output_dtype), x0, generators(4))

    low = losses(x0, torch.bfloat16)
    assert low.dtype == torch.float32
    assert torch.equal(low, losses(x0.float(), torch.float32))


@pytest.mark.filterwarnings("ignore:objective.min_snr_gamma")
@sound
def test_min_snr_weighs_every_target_as_the_same_error_of_x0(config):
    objective = Objective(replace(config, min_snr_gamma=5.0))
    timesteps = objective.schedule.timesteps(torch.linspace(0.02, 0.98, 49))
    alpha, sigma = objective.schedule.alpha_sigma(timesteps, dtype=torch.float64)
    x0_error, _ = recover(torch.ones_like(alpha), torch.zeros_like(alpha), config.prediction_type, alpha, sigma)
    expected = snr(alpha, sigma).clamp(max=5) * x0_error**2  # x0 error of a unit error of the output
    torch.testing.assert_close(objective.weight(alpha, sigma), expected, rtol=1e-9, atol=0)


def test_min_snr_weights_are_those_of_the_paper():
    """Hang et al. 2023, section 3.4, at SNR 1/4, 1 and 25 with gamma 5."""
    ratio = torch.tensor([0.25, 1, 25], dtype=torch.float64)
    alpha, sigma = (ratio / (1 + ratio)).sqrt(), (1 / (1 + ratio)).sqrt()
    for prediction_type, weights in {
        "epsilon": [1, 1, 5 / 25],
        "sample": [0.25, 1, 5],
        "v_prediction": [0.25 / 1.25, 1 / 2, 5 / 26],
    }.items():
        objective = Objective(ObjectiveConfig("linear", prediction_type, min_snr_gamma=5.0))
        assert objective.weight(alpha, sigma).tolist() == pytest.approx(weights, rel=1e-12)


@pytest.mark.filterwarnings("ignore:objective.min_snr_gamma")
@sound
def test_loss_is_finite_at_pure_data_and_at_pure_noise(config):
    objective = Objective(replace(config, min_snr_gamma=5.0))
    x0, noise = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0))
    loss = objective.loss_at(lambda x_t, timesteps: x_t, x0, noise, torch.tensor([0.0, 1.0]))
    assert loss.isfinite().all()


@table(
    "config",
    [
        ObjectiveConfig("cosine", "v_prediction", zero_terminal_snr=True),
        ObjectiveConfig("flow", "flow_prediction"),
    ],
)
def test_min_snr_warns_where_pure_noise_would_go_untrained(config):
    with pytest.warns(UserWarning, match=r"pure noise.*never trained; leave it out"):
        Objective(replace(config, min_snr_gamma=5.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = Objective(config), Objective(ObjectiveConfig("cosine", "v_prediction", min_snr_gamma=5.0))
    assert [objective.config.min_snr_gamma for objective in silent] == [None, 5.0]


@table(
    ("path", "prediction_type", "rescaled"),
    [*product(get_args(PathName), get_args(PredictionType), (False, True))],
)
def test_exactly_the_sound_combinations_are_built(path, prediction_type, rescaled):
    config = ObjectiveConfig(path, prediction_type, zero_terminal_snr=rescaled)
    if (path, prediction_type, rescaled) in SOUND:
        Objective(config)
    else:
        with pytest.raises(ValueError, match=r"use|leave it out"):
            Objective(config)


@table(
    ("changes", "reason"),
    [
        ({"timestep_density": "logit_normal", "logit_std": 0.0}, "logit_std 0.0: must be positive"),
        ({"logit_mean": 1.0}, "no effect on a uniform timestep_density; set timestep_density: logit_normal"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma 0.0: must be positive; 5 is usual"),
    ],
)
def test_meaningless_settings_are_refused_with_reason_and_remedy(changes, reason):
    with pytest.raises(ValueError, match=reason):
        Objective(ObjectiveConfig(**changes))


def test_wrong_inputs_are_named():
    objective, x0 = Objective(ObjectiveConfig()), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        loss(objective, lambda x_t, timesteps: x_t, x0, generators(1))
    with pytest.raises(ValueError, match=r"returned \(2, 6\), expected \(2, 3\)"):
        loss(objective, lambda x_t, timesteps: torch.zeros(2, 6), x0, generators(2))
    with pytest.raises(ValueError, match=r"u = 500: must be in \[0, 1\]; it is not a timestep"):
        objective.loss_at(lambda x_t, timesteps: x_t, x0, x0, 500)


@sound
def test_no_linear_output_is_better_for_a_gaussian(config):
    objective = Objective(config)
    x0, noise = torch.randn(2, 400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for u in (0.1, 0.5, 0.9):
        alpha, sigma = objective.schedule.alpha_sigma(objective.schedule.timesteps(torch.tensor([u])))
        a, b = target_coefficients(config.prediction_type, alpha, sigma)
        best = float((a * sigma - b * alpha) ** 2 / (alpha**2 + sigma**2))
        loss = float(objective.loss_at(objective.linear_output, x0, noise, u).mean())
        assert loss == pytest.approx(best, rel=0.02)  # 77,000 numbers: 0.5 % is one standard error
