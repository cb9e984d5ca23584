import math

import pytest
import torch

from ldm.config import ReconstructionConfig
from ldm.evaluation.quality import psnr, ssim
from ldm.reconstruction import kl_to_standard_normal, reconstruction_loss


def test_psnr_of_a_constant_error_is_its_closed_form():
    original = torch.zeros(3, 3, 16, 16)
    shifted = original + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1)
    assert psnr(shifted, original).tolist() == pytest.approx([20, 40, 100], abs=1e-4)  # 20 log10(2 / error)


def test_psnr_sees_pictures_as_they_are_shown():
    assert psnr(torch.full((1, 3, 16, 16), 7.0), torch.ones(1, 3, 16, 16)).item() == 100


def test_ssim_is_1_for_equal_pictures_and_falls_with_noise():
    torch.manual_seed(0)
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    values = [float(ssim(picture + level * torch.randn_like(picture), picture).mean()) for level in (0, 0.1, 0.5)]
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values[0] > values[1] > values[2]


def test_kl_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean, logvar = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(kl_to_standard_normal(mean, logvar), expected, rtol=1e-5)


def test_the_kl_weight_does_not_depend_on_the_size_of_the_picture():
    config = ReconstructionConfig(l1_weight=0, l2_weight=0, kl_weight=1)
    values = []
    for size in (8, 16):
        mean = torch.full((2, 4, size // 8, size // 8), 1.5)
        picture = torch.zeros(2, 3, size, size)
        values.append(float(reconstruction_loss(picture, picture, mean, torch.zeros_like(mean), config)))
    assert values[0] == pytest.approx(values[1])
    assert values[0] == pytest.approx(4 * 0.5 * 1.5**2 / (3 * 64))


def test_each_error_has_its_weight():
    zeros = torch.zeros(1, 1, 1, 1)
    picture, rebuilt = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    config = ReconstructionConfig(l1_weight=2, l2_weight=3, kl_weight=5)
    assert float(reconstruction_loss(picture, rebuilt, zeros, zeros, config)) == pytest.approx(2 * 0.5 + 3 * 0.25)


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
