import pytest
import torch

from ldm.evaluation.quality import flicker, psnr, ssim


def test_psnr_of_a_constant_error_is_its_closed_form():
    original = torch.zeros(3, 3, 16, 16)
    shifted = original + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1)
    assert psnr(shifted, original).tolist() == pytest.approx([20, 40, 100], abs=1e-4)  # 20 log10(2 / error)


def test_psnr_sees_images_as_they_are_shown():
    assert psnr(torch.full((1, 3, 16, 16), 7.0), torch.ones(1, 3, 16, 16)).item() == 100


def test_ssim_is_1_for_equal_images_and_falls_with_noise():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    values = [float(ssim(image + level * torch.randn_like(image), image).mean()) for level in (0, 0.1, 0.5)]
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values[0] > values[1] > values[2]


def test_flicker_is_the_error_of_the_change_and_not_of_the_frames():
    clips = torch.rand(2, 3, 4, 8, 8) - 0.5
    assert flicker(clips + 0.2, clips).tolist() == pytest.approx([0, 0], abs=1e-4)
    one_frame = clips.clone()
    one_frame[0, :, 2] += 0.2  # two of three changes
    assert flicker(one_frame, clips).tolist() == pytest.approx([127.5 * 0.2 * 2 / 3, 0], abs=1e-3)
    still = clips[:, :, :1].repeat(1, 1, 4, 1, 1)
    assert flicker(0 * still, still).tolist() == [0, 0]
