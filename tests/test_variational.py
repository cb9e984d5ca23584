"""Learned variance: closed forms, torch.distributions and diffusers' ancestral sampler as references."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ldm.config import ObjectiveConfig
from ldm.objectives.denoising import Objective
from ldm.objectives.schedule import build_schedule
from ldm.objectives.variational import interpolated_log_variance, log_likelihood, normal_kl, posterior, variational_term
from ldm.spaces import PixelSpace

from .table import table

STEPS = 50
PIXEL_STEP = PixelSpace.grid_step
CONFIG = ObjectiveConfig(path="linear", num_train_timesteps=STEPS, variational_weight=1.0)
SCHEDULE = build_schedule(CONFIG)


def tensors(count=STEPS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x0 = (torch.rand(count, 3, 4, 4, generator=draw) * 255).round() / 127.5 - 1
    return x0, torch.randn(count, 3, 4, 4, generator=draw)


def noised(x0, noise, timesteps):
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in SCHEDULE.alpha_sigma(timesteps))
    return alpha * x0 + sigma * noise


def term(x0, x_t, timesteps, predicted_x0, values, grid_step=PIXEL_STEP):
    log_variance = interpolated_log_variance(SCHEDULE, values, timesteps)
    return variational_term(SCHEDULE, x0, x_t, timesteps, predicted_x0, log_variance, grid_step)


def test_the_posterior_is_bayes_rule_on_the_two_transitions():
    """q(x_{t-1} | x_t, x0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x0): precisions add."""
    timesteps = torch.arange(1, STEPS)
    x0, noise = (values[1:].double() for values in tensors())
    x_t = noised(x0, noise, timesteps).double()
    beta = SCHEDULE.betas[1:].view(-1, 1, 1, 1)
    before = SCHEDULE.alphas_cumprod[:-1].view(-1, 1, 1, 1)
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() / beta * x_t + before.sqrt() / (1 - before) * x0) / precision
    ours, log_variance = posterior(SCHEDULE, x0, x_t, timesteps)
    assert torch.allclose(ours, mean, atol=1e-12)
    assert torch.allclose(log_variance, -precision.log(), atol=1e-12)


def test_at_the_first_step_the_posterior_is_the_data():
    x0, noise = tensors(1)
    mean, log_variance = posterior(SCHEDULE, x0, noised(x0, noise, torch.zeros(1).long()), torch.zeros(1).long())
    assert torch.allclose(mean, x0, atol=1e-6)
    assert log_variance.item() == pytest.approx(posterior(SCHEDULE, x0, x0, torch.ones(1).long())[1].item())


def test_the_variance_is_the_one_that_diffusers_samples_with():
    stock = DDPMScheduler(
        num_train_timesteps=STEPS,
        beta_start=float(SCHEDULE.betas[0]),
        beta_end=float(SCHEDULE.betas[-1]),
        variance_type="learned_range",
    )
    for timestep in (1, 7, STEPS - 1):
        for value in (-1.0, 0.3, 1.0):
            values = torch.full((1, 1, 1, 1), value)
            ours = interpolated_log_variance(SCHEDULE, values, torch.tensor([timestep]))
            theirs = stock._get_variance(timestep, predicted_variance=values)  # the log-variance, for learned_range
            assert torch.allclose(ours, theirs, atol=1e-4)


def test_kl_and_density_are_those_of_torch_distributions():
    torch.manual_seed(0)
    mean, other, log_variance, other_log_variance = torch.randn(4, 100, dtype=torch.float64)
    one = torch.distributions.Normal(mean, (log_variance / 2).exp())
    two = torch.distributions.Normal(other, (other_log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(one, two)
    assert torch.allclose(normal_kl(mean, log_variance, other, other_log_variance), expected, rtol=1e-10)
    assert torch.allclose(log_likelihood(other, mean, log_variance, 0), one.log_prob(other), rtol=1e-10)


@table("mean", [-1.4, -0.3, 0.0, 0.99])
def test_the_bins_of_a_pixel_have_probability_one_in_all(mean):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for log_variance in (-6.0, -1.0, 1.0):
        filled = (torch.tensor(value, dtype=torch.float64).expand(256) for value in (mean, log_variance))
        total = log_likelihood(levels, *filled, PIXEL_STEP).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-9)


def test_a_perfect_prediction_with_the_lower_variance_has_no_divergence():
    timesteps = torch.arange(STEPS)
    x0, noise = tensors()
    x_t = noised(x0, noise, timesteps)
    bits = term(x0, x_t, timesteps, x0, torch.full_like(x0, -1.0))
    assert bits[1:].abs().max() < 1e-6
    assert float(bits[0]) > 0  # the first is a likelihood
    wider = term(x0, x_t, timesteps, x0, torch.ones_like(x0))
    ratio = SCHEDULE.betas[1:] / posterior(SCHEDULE, x0, x_t, timesteps)[1][1:].exp().flatten()
    expected = 0.5 * (ratio.log() + 1 / ratio - 1) / math.log(2)  # of two normals with one mean
    assert torch.allclose(wider[1:], expected.float(), atol=1e-5)


def test_the_bound_trains_the_variance_and_the_error_trains_the_mean():
    x0, noise = tensors()
    u = torch.arange(STEPS) / STEPS
    gradients = {}
    for weight in (None, 1.0, 2.0):
        config = ObjectiveConfig(path="linear", num_train_timesteps=STEPS, variational_weight=weight)
        output = torch.full((STEPS, 3 if weight is None else 6, 4, 4), 0.1, requires_grad=True)
        Objective(config).loss_at(lambda x_t, timesteps, output=output: output, x0, noise, u).sum().backward()
        gradients[weight] = output.grad
    assert torch.equal(gradients[1.0][:, :3], gradients[None])
    assert torch.allclose(gradients[2.0][:, 3:], 2 * gradients[1.0][:, 3:])
    assert gradients[1.0][:, 3:].abs().amax((1, 2, 3)).min() > 0


def test_the_best_variance_of_one_point_is_the_lower_bound_and_of_normal_data_the_upper():
    """Nichol & Dhariwal 2021, section 3.1: beta_t for N(0, I), the posterior's for a point."""
    timesteps = torch.full((4000,), 20)
    draw = torch.Generator().manual_seed(1)
    for data, best in ((torch.randn(4000, 1, generator=draw), 1.0), (torch.zeros(4000, 1), -1.0)):
        noise = torch.randn(4000, 1, generator=draw)
        alpha, sigma = (level.view(-1, 1) for level in SCHEDULE.alpha_sigma(timesteps))
        x_t = alpha * data + sigma * noise
        predicted = alpha * x_t if best == 1 else data  # E[x0 | x_t]
        values = {
            value: float(term(data, x_t, timesteps, predicted, torch.full_like(data, value), grid_step=0).mean())
            for value in (-1.0, -0.5, 0.0, 0.5, 1.0)
        }
        assert min(values, key=values.get) == best


def test_unsound_combinations_and_shapes_are_refused():
    for wrong in ({"path": "flow", "prediction_type": "flow_prediction"}, {"variational_weight": 0.0}):
        with pytest.raises(ValueError, match="variational_weight"):
            Objective(ObjectiveConfig(**{"variational_weight": 1.0, **wrong}))
    x0, noise = tensors()
    with pytest.raises(ValueError, match=r"returned \(50, 3, 4, 4\), expected \(50, 6, 4, 4\)"):
        Objective(CONFIG).loss_at(lambda x_t, timesteps: x_t, x0, noise, 0.5)
