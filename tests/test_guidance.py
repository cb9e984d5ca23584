"""Classifier-free guidance: its ends, its linearity, and what becomes of a learned variance."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from pipelines.sampling import guide

from .table import table


def outputs(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, channels, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))


def test_scale_0_is_unconditional_and_1_is_conditional():
    uncond, cond = outputs(4)
    torch.testing.assert_close(guide(uncond, cond, 0.0, 4), uncond)
    torch.testing.assert_close(guide(uncond, cond, 1.0, 4), cond)


def test_equation_6_of_ho_and_salimans():
    uncond, cond = outputs(4)
    w = 2.0
    torch.testing.assert_close(guide(uncond, cond, 1 + w, 4), (1 + w) * cond - w * uncond)


def test_guiding_the_noise_is_guiding_the_velocity():
    """v = (noise - sigma x_t) / alpha, and so guiding before or after the conversion is the same."""
    uncond, cond = outputs(4)
    x_t, alpha, sigma = torch.ones_like(cond), 0.6, 0.8
    velocities = [(noise - sigma * x_t) / alpha for noise in (uncond, cond)]
    expected = (guide(uncond, cond, 3.0, 4) - sigma * x_t) / alpha
    torch.testing.assert_close(guide(*velocities, 3.0, 4), expected)


def test_learned_variance_is_the_conditional_one_bit_for_bit():
    uncond, cond = outputs(8)
    guided = guide(uncond, cond, 3.0, 4)
    torch.testing.assert_close(guided[:, :4], guide(uncond[:, :4], cond[:, :4], 3.0, 4))
    assert torch.equal(guided[:, 4:], cond[:, 4:])


def test_rescaled_guidance_is_that_of_the_stock_pipeline_and_has_the_conditional_spread():
    uncond, cond = outputs(8)
    plain = guide(uncond, cond, 5.0, 4)[:, :4]
    for share in (0.0, 0.7, 1.0):
        found = guide(uncond, cond, 5.0, 4, share)
        torch.testing.assert_close(found[:, :4], rescale_noise_cfg(plain, cond[:, :4], guidance_rescale=share))
        assert torch.equal(found[:, 4:], cond[:, 4:])
    torch.testing.assert_close(found[:, :4].std((1, 2, 3)), cond[:, :4].std((1, 2, 3)))


@table(("first", "second"), [(6, 6), (4, 8), (3, 3)])
def test_other_shapes_are_refused(first, second):
    with pytest.raises(ValueError, match="expected two alike with 4 channels, or 8 with a learned variance"):
        guide(outputs(first)[0], outputs(second)[0], 3.0, 4)
