"""Which noise levels are drawn: that importance sampling changes no mean, and what it remembers."""

import pytest
import torch

from ldm.config import ObjectiveConfig
from ldm.objectives.denoising import Objective
from ldm.objectives.density import LossSecondMomentDensity, build_density
from ldm.objectives.schedule import build_schedule

from .table import table

STEPS = 40
BOUND = ObjectiveConfig(
    "cosine",
    num_train_timesteps=STEPS,
    variational_weight=1.0,
    variational_only=True,
    timestep_density="loss_second_moment",
)


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def level(timestep):
    return (torch.as_tensor(timestep) + 0.5) / STEPS


def taught(losses):
    """A density that saw each timestep's loss as often as it remembers."""
    density = LossSecondMomentDensity(STEPS)
    for _ in range(density.HISTORY):
        density.observe(level(torch.arange(STEPS)), losses)
    return density


def losses():
    return torch.logspace(-3, 1, STEPS)


def test_every_timestep_is_drawn_alike_until_each_was_seen_often_enough():
    density = LossSecondMomentDensity(STEPS)
    for _ in range(density.HISTORY):
        assert torch.equal(density.probabilities(), torch.full((STEPS,), 1 / STEPS, dtype=torch.float64))
        assert torch.equal(density.weight(level(torch.arange(STEPS))), torch.ones(STEPS))
        density.observe(level(torch.arange(STEPS)), losses())
    assert float(density.probabilities().max()) > 2 / STEPS


def test_the_probabilities_are_those_of_the_paper():
    """Nichol & Dhariwal 2021, eq. 18: p_t is proportional to the root of E[L_t^2]."""
    density = LossSecondMomentDensity(STEPS)
    history = torch.rand(density.HISTORY, STEPS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for seen in history:
        density.observe(level(torch.arange(STEPS)), seen)
    moments = history.square().mean(0).sqrt()
    expected = 0.999 * moments / moments.sum() + 0.001 / STEPS
    torch.testing.assert_close(density.probabilities(), expected)


def test_the_oldest_loss_is_forgotten():
    density = taught(torch.ones(STEPS))
    density.observe(level(torch.full((density.HISTORY,), 3)), torch.full((density.HISTORY,), 100.0))
    assert density.memory["losses"][3].tolist() == [100.0] * density.HISTORY
    assert density.memory["losses"][4].tolist() == [1.0] * density.HISTORY


def test_the_expected_weighted_loss_is_the_mean_loss():
    density, found = taught(losses()), losses().double()
    weights = density.weight(level(torch.arange(STEPS))).double()
    assert float((density.probabilities() * weights * found).sum()) == pytest.approx(float(found.mean()), rel=1e-6)


def test_draws_follow_the_probabilities_and_name_their_timesteps():
    density = taught(losses())
    drawn = build_schedule(BOUND).timesteps(density.draw(generators(20_000)))
    share = torch.bincount(drawn, minlength=STEPS) / len(drawn)
    torch.testing.assert_close(share.double(), density.probabilities(), atol=0.01, rtol=0)


def test_its_estimate_of_the_bound_varies_less_than_uniform_draws():
    def estimates(density):
        levels = density.draw(generators(20_000))
        timesteps = build_schedule(BOUND).timesteps(levels)
        return density.weight(levels) * losses()[timesteps]

    uniform, weighted = estimates(LossSecondMomentDensity(STEPS)), estimates(taught(losses()))
    assert float(weighted.mean()) == pytest.approx(float(losses().mean()), rel=0.02)
    assert float(weighted.std()) < 0.1 * float(uniform.std())


def test_the_bound_alone_trains_mean_and_variance():
    """Against `variational_term` itself: the gradient reaches both halves, and the squared error is not in the loss."""
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(4, 3, 4, 4, generator=draw) * 2 - 1, torch.randn(4, 3, 4, 4, generator=draw)
    output = torch.randn(4, 6, 4, 4, generator=draw).requires_grad_()
    levels = level(torch.tensor([0, 5, 20, 39]))
    alone = Objective(BOUND).loss_at(lambda x_t, timesteps: output, x0, noise, levels)
    (gradient,) = torch.autograd.grad(alone.sum(), output)
    assert gradient[:, :3].abs().flatten(1).sum(1).min() > 0
    assert gradient[:, 3:].abs().flatten(1).sum(1).min() > 0
    hybrid = Objective(ObjectiveConfig("cosine", num_train_timesteps=STEPS, variational_weight=1.0))
    squared = Objective(ObjectiveConfig("cosine", num_train_timesteps=STEPS))
    error = squared.loss_at(lambda x_t, timesteps: output[:, :3], x0, noise, levels)
    both = hybrid.loss_at(lambda x_t, timesteps: output, x0, noise, levels)
    torch.testing.assert_close(alone, both - error, atol=1e-5, rtol=1e-5)


@table(
    ("wrong", "said"),
    [
        ({"path": "flow", "prediction_type": "flow_prediction"}, "the flow path has none"),
        ({"logit_mean": 1.0}, "no effect on a loss_second_moment timestep_density"),
    ],
)
def test_what_it_cannot_be_built_from_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        build_density(ObjectiveConfig(**{"timestep_density": "loss_second_moment"} | wrong))


@table("wrong", [{"variational_weight": None}, {"min_snr_gamma": 5.0}])
def test_the_bound_alone_needs_a_learned_variance_and_no_other_weight(wrong):
    settings = {"path": "cosine", "variational_weight": 1.0, "variational_only": True} | wrong
    with pytest.raises(ValueError, match=r"objective\.variational_only"):
        Objective(ObjectiveConfig(**settings))
