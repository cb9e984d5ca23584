import math

import pytest
import torch

from ldm.config import ReconstructionConfig
from ldm.models.bottleneck import kl_to_standard_normal
from ldm.objectives.reconstruction import (
    MAX_ADAPTIVE_WEIGHT,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    negative_log_likelihood,
    reconstruction_error,
)

from .table import table


def test_kl_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean, logvar = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(kl_to_standard_normal(mean, logvar), expected, rtol=1e-5)


def test_each_error_has_its_weight():
    image, rebuilt = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    config = ReconstructionConfig(l1_weight=2, l2_weight=3, perceptual_weight=5)
    terms = reconstruction_error(image, rebuilt, config, lambda one, two: (one - two).flatten(1).sum(1))
    assert {name: float(term) for name, term in terms.items()} == {"l1": 1.0, "l2": 0.75, "perceptual": 5 * 24}
    assert "perceptual" not in reconstruction_error(image, rebuilt, config)


def test_the_change_of_a_clip_is_wrong_only_where_frames_have_other_errors():
    clip = torch.rand(2, 3, 4, 8, 8)
    config = ReconstructionConfig(l1_weight=0, change_weight=2)
    assert float(reconstruction_error(clip, clip + 0.3, config)["change"]) == pytest.approx(0, abs=1e-6)
    flickers = clip.clone()
    flickers[:, :, 1::2] += 0.1  # three changes, each wrong by 0.1
    assert float(reconstruction_error(clip, flickers, config)["change"]) == pytest.approx(0.2, abs=1e-6)
    assert "change" not in reconstruction_error(clip[:, :, 0], clip[:, :, 0], config)
    seen = []
    config = ReconstructionConfig(change_weight=0)
    reconstruction_error(clip, clip, config, lambda one, two: seen.append(one) or torch.zeros(len(one)))
    assert torch.equal(seen[0], torch.cat([clip[0].transpose(0, 1), clip[1].transpose(0, 1)])), "frame by frame"


def test_elbo_is_below_the_exact_likelihood_of_a_linear_gaussian_autoencoder():
    """x = w z + s n with z, n standard normal: log p(x) is known, and the bound is tight at the true posterior."""
    w, s, x = 1.3, 0.6, torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = torch.distributions.Normal(0.0, math.sqrt(w * w + s * s)).log_prob(x)
    precision = 1 + w * w / (s * s)
    best_mean, best_var = w * x / (s * s * precision), 1 / precision

    def elbo(mean, var):
        kl = kl_to_standard_normal(mean.view(-1, 1), torch.full_like(mean, math.log(var)).view(-1, 1))
        # E_q (x - w z)^2 = (x - w mean)^2 + w^2 var
        likelihood = -0.5 * (((x - w * mean) ** 2 + w * w * var) / (s * s) + math.log(2 * math.pi * s * s))
        return likelihood - kl.double()

    assert torch.allclose(elbo(best_mean, best_var), exact, atol=1e-6)
    for shift, factor in ((0.3, 1.0), (0.0, 2.0), (-0.1, 0.5)):
        assert (elbo(best_mean + shift, best_var * factor) < exact).all()


def test_the_learned_scale_is_best_where_it_is_the_errors():
    error = torch.tensor(0.3)
    values = {scale: float(negative_log_likelihood(error, torch.tensor(scale))) for scale in (-2.0, math.log(0.3), 0.0)}
    assert min(values, key=values.get) == math.log(0.3)
    assert values[math.log(0.3)] == pytest.approx(1 + math.log(0.3))
    assert values[0.0] == pytest.approx(0.3)  # logvar 0: the error itself


def test_the_likelihood_is_that_of_torch_distributions_up_to_constants():
    error = torch.linspace(0.1, 2, 7)
    for scale in (0.5, 1.7):
        laplace = -torch.distributions.Laplace(0.0, scale).log_prob(error)
        ours = negative_log_likelihood(error, torch.tensor(scale).log())
        assert torch.allclose(ours, laplace - math.log(2), atol=1e-6)
        normal = -torch.distributions.Normal(0.0, scale**0.5).log_prob(error)
        ours = negative_log_likelihood(error.square(), torch.tensor(scale).log())
        assert torch.allclose(ours, 2 * normal - math.log(2 * math.pi), atol=1e-6)


REAL = torch.tensor([5, 3, 2, 0], dtype=torch.float64) / 10
FAKE = torch.tensor([1, 3, 4, 2], dtype=torch.float64) / 10


def draws(density, values):
    """Return `values` of a sample that has exactly this density."""
    return values.repeat_interleave((density * 10).round().long())


def test_the_minimax_value_at_the_best_discriminator_is_the_jensen_shannon_divergence():
    """Goodfellow et al. 2014, theorem 1: max_D V = 2 JSD - 2 log 2, at D = p / (p + q)."""
    best = (REAL.clamp(min=1e-30) / FAKE).log()  # the logit of p / (p + q)
    value = -float(discriminator_loss("minimax", draws(REAL, best), draws(FAKE, best)))
    middle = (REAL + FAKE) / 2
    jsd = 0.5 * (torch.xlogy(REAL, REAL / middle).sum() + torch.xlogy(FAKE, FAKE / middle).sum())
    assert value == pytest.approx(float(2 * jsd - 2 * math.log(2)), abs=1e-6)
    torch.manual_seed(0)
    for _ in range(20):
        other = best + torch.randn(4, dtype=torch.float64)
        assert -float(discriminator_loss("minimax", draws(REAL, other), draws(FAKE, other))) < value


def test_equal_densities_give_minus_two_log_two():
    zeros = torch.zeros(10)
    assert float(discriminator_loss("minimax", zeros, zeros)) == pytest.approx(2 * math.log(2))


def test_the_best_hinge_discriminator_says_who_is_likelier():
    """Lim & Ye 2017: sign(p - q), with loss 1 - total variation."""
    best = (REAL - FAKE).sign()
    loss = float(discriminator_loss("hinge", draws(REAL, best), draws(FAKE, best)))
    assert loss == pytest.approx(1 - 0.5 * float((REAL - FAKE).abs().sum()))
    torch.manual_seed(0)
    for _ in range(20):
        other = best + torch.randn(4, dtype=torch.float64)
        assert float(discriminator_loss("hinge", draws(REAL, other), draws(FAKE, other))) >= loss - 1e-6


@table("kind", ["hinge", "minimax"])
def test_the_autoencoder_gains_by_being_taken_for_real(kind):
    logits = torch.linspace(-3, 3, 7, requires_grad=True)
    generator_loss(kind, logits).backward()
    assert (logits.grad < 0).all()


def test_the_adaptive_weight_balances_the_gradients_of_the_last_layer():
    layer = torch.nn.Linear(3, 2, bias=False)
    error, adversarial = layer(torch.ones(3)).sum() * 6, layer(torch.ones(3)).sum() * 2
    weight = adaptive_weight(error, adversarial, layer.weight)
    assert float(weight) == pytest.approx(3, rel=1e-3)
    (error + weight * adversarial).backward()  # both graphs are still there
    assert torch.allclose(layer.weight.grad, torch.full((2, 3), 12.0), rtol=1e-3)
    assert float(adaptive_weight(error_of(layer), 0 * layer.weight.sum(), layer.weight)) == MAX_ADAPTIVE_WEIGHT


def error_of(layer):
    return 10 * layer(torch.ones(3)).sum()
