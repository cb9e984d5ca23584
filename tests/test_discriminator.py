import pytest
import torch

from ldm.models.discriminator import PatchDiscriminator


def test_its_receptive_field_is_the_papers():
    """Isola et al. 2017: 70 pixels with three layers, 34 with two."""
    for layers, field in ((3, 70), (2, 34)):
        discriminator = PatchDiscriminator(8, layers)
        for module in discriminator.modules():  # the norm sees the whole image: the field is that of the convolutions
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda hidden: hidden
        image = torch.zeros(1, 3, 160, 160, requires_grad=True)
        logits = discriminator(image)
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
        seen = image.grad.abs().sum((0, 1)).nonzero()
        assert int(seen[:, 0].max() - seen[:, 0].min()) + 1 == field


def test_an_images_logits_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    discriminator, images = PatchDiscriminator(8, 2).train(), torch.rand(4, 3, 32, 32)
    assert torch.allclose(discriminator(images)[:1], discriminator(images[:1]), atol=1e-6)


def test_of_clips_its_patches_see_the_frames_beside_them_too():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 1, clips=True)
    clips = torch.rand(2, 3, 12, 16, 16)
    before = discriminator(clips)
    assert before.shape[:3] == (2, 1, 12), "a logit for each frame"
    for module in discriminator.modules():  # the norm sees the whole clip
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda hidden: hidden
    before, moved = discriminator(clips), clips.clone()
    moved[:, :, 6] += 1
    changed = (discriminator(moved) - before).abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()
    assert changed == [3, 4, 5, 6, 7, 8, 9], "three convolutions of three frames"


def test_frozen_gives_the_same_logits_and_no_gradient_to_itself():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = discriminator.frozen(images)
    assert torch.equal(logits, discriminator(images))
    discriminator.frozen(images).sum().backward()
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="discriminator_channels 6"):
        PatchDiscriminator(6)
