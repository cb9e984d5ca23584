"""Networks for evaluation: features of images, and the agreement of images with captions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Model,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ldm.config.places import pinned, portable
from ldm.errors import explained
from ldm.models.features import EFFICIENTNETS, efficientnet
from ldm.models.foreign import own_code_refused, refuse_strange_shards
from ldm.models.network import weights_sha256
from ldm.models.quiet import quietly
from ldm.terminal import progress_bar

Images = NDArray[np.uint8]
"""Images, (N, H, W, 3), RGB in [0, 255]."""

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of RGB in [0, 1], by channel, with which a network's inputs are normalised."""

NONE: Statistics = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
HALVES: Statistics = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
IMAGENET: Statistics = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
OPENAI: Statistics = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MODEL_TYPES = ("clip", "clip_vision_model", "dinov2")
"""Allowed values of ``model_type`` in the config of a transformers model."""

SIZE = 224
"""Pixels, height and width, of DINOv2's input (Stein et al. 2023)."""

EFFICIENTNET_SIZE = 128
"""Pixels, height and width, of EfficientNet's input. It was trained with 224, which takes three times as long and adds
nothing for 64-pixel images."""

INCEPTION_SIZE = 299
CHUNK = 64


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network from images to features, with all that its numbers depend on."""

    name: str
    sha256: str
    """SHA-256 of the weights without a projection: equal for all copies of one network."""
    size: int
    """Pixels, height and width, that images are resized to."""
    statistics: Statistics
    embed: Callable[[Tensor], Tensor]
    """Features, (B, D), of images (B, 3, size, size), resized and normalised."""
    device: torch.device

    @property
    def resize(self) -> str:
        """The resize of the images, in words; features of images that were resized otherwise are not comparable."""
        return f"bicubic, antialiased, to {self.size} x {self.size} px"

    @torch.no_grad()
    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Return the features, (N, D), of images (N, H, W, 3), uint8, of any size and shape; nothing is cropped."""
        parts = [self.embed(self._prepared(part)).float().cpu() for part in _chunks(images, self.name)]
        return cast(NDArray[np.float32], torch.cat(parts).numpy())

    def _prepared(self, images: Images) -> Tensor:
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in self.statistics)
        return (resized(images, self.size).to(self.device) - mean) / std


class ClipScore:
    """The agreement of images with captions, measured by a CLIP."""

    def __init__(self, name: str):
        """Load a whole CLIP, both towers, from a folder or the Hub (``user/name@revision`` too)."""
        network = _load(name, ("clip",))
        self.network, self.images = network.network, network.features
        place, revision = pinned(name)
        with explained(name), own_code_refused("the tokenizer", name):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **revision)

    @torch.no_grad()
    def image_text_similarity(self, images: Images, captions: Sequence[str]) -> NDArray[np.float32]:
        """Return 100 max(cos, 0) of each image, (N, H, W, 3) uint8, and its caption, (N,) in [0, 100].

        Hessel et al. 2021, eq. 1, with 100 in place of 2.5 and no words before the caption. Captions that are longer
        than CLIP's context are cut.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images and {len(captions)} captions; expected a caption for each image")
        embeds = torch.from_numpy(self.images(images))
        length = self.network.config.text_config.max_position_embeddings
        texts = []
        for start in range(0, len(captions), CHUNK):
            part = list(captions[start : start + CHUNK])
            read = self.tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
            device = self.images.device
            pooled = self.network.text_model(read.input_ids.to(device), read.attention_mask.to(device)).pooler_output
            texts.append(self.network.text_projection(pooled).float().cpu())
        return cast(NDArray[np.float32], 100 * F.cosine_similarity(embeds, torch.cat(texts)).clamp(min=0).numpy())


def build_feature_network(name: str) -> FeatureNetwork:
    """Return the network `name`, on the GPU if there is one.

    `name` is one of:
    ``efficientnet_lite0``: the 1280 features before the classifier;
    ``inception``: the 2048 features of the original FID, with another resize (Parmar et al. 2022);
    a folder or Hub name (``user/name@revision`` too) of a CLIP, of its vision model with or without projection, or of a
    DINOv2: the projected output if there is a projection, else the pooled one.

    Raises:
        ImportError: packages are missing.
        OSError: there is no such model, or its weights could not be downloaded.
        ValueError: the model is of another kind, lacks weights, or comes with its own code.

    """
    if name == "inception":
        return _inception()
    if name in EFFICIENTNETS:
        network = efficientnet(name).eval().requires_grad_(False).to(_device(), memory_format=torch.channels_last)

        def pooled(pixel_values: Tensor) -> Tensor:
            return cast(Tensor, network.extract_features(pixel_values)).mean((2, 3))

        return FeatureNetwork(name, EFFICIENTNETS[name], EFFICIENTNET_SIZE, HALVES, pooled, _device())
    return _load(name, MODEL_TYPES).features


def resized(images: Images, size: int) -> Tensor:
    """Return images (N, H, W, 3), uint8, resized by an antialiased bicubic filter: (N, 3, size, size) in [0, 1].

    The filter is Pillow's on floats: nothing is rounded in between, and values out of range are clipped at the end.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return pixels.clamp(0, 255) / 255


def tower(network: nn.Module) -> nn.Module:
    """Return the vision model of a CLIP or of a network with a projection, else the network itself; it is hashed."""
    return cast(nn.Module, getattr(network, "vision_model", network))


@dataclass(frozen=True)
class _Loaded:
    network: Any
    features: FeatureNetwork


def _load(name: str, kinds: Sequence[str]) -> _Loaded:
    with explained(name):
        return _read(name, kinds)


@quietly()
def _read(name: str, kinds: Sequence[str]) -> _Loaded:
    place, revision = pinned(name)
    with own_code_refused("a feature network", name):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **revision)
    if config.model_type not in kinds:
        raise ValueError(f"{name} is a {config.model_type}, which is not known to measure; expected {', '.join(kinds)}")
    refuse_strange_shards(place)
    kind = _class(config)
    network, report = kind.from_pretrained(
        place, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True, **revision
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name} lacks {missing[0]} of {kind.__name__}; random weights in its place measure nothing")
    network = network.eval().requires_grad_(False).to(_device())

    def embed(pixel_values: Tensor) -> Tensor:
        pooled = cast(Tensor, tower(network)(pixel_values).pooler_output)
        return cast(Tensor, network.visual_projection(pooled)) if hasattr(network, "visual_projection") else pooled

    clip = config.model_type != "dinov2"
    size = int(getattr(config, "vision_config", config).image_size) if clip else SIZE
    called, sha256 = str(portable(name)), weights_sha256(tower(network))
    return _Loaded(network, FeatureNetwork(called, sha256, size, OPENAI if clip else IMAGENET, embed, _device()))


def _class(config: Any) -> Any:
    match config.model_type:
        case "clip":
            return CLIPModel
        case "dinov2":
            return Dinov2Model
    return CLIPVisionModel if config.architectures == ["CLIPVisionModel"] else CLIPVisionModelWithProjection


def _inception() -> FeatureNetwork:
    try:
        extractor = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise ImportError("inception needs a package: pip install torch-fidelity") from error
    try:
        network = extractor.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:
        raise OSError(
            f"the weights of inception could not be downloaded ({error}); put weights-inception-2015-12-05-6726825d.pth"
            " into torch.hub's folder of checkpoints, or choose another network"
        ) from error
    network = network.eval().requires_grad_(False).to(_device())

    def embed(pixels: Tensor) -> Tensor:
        return cast(Tensor, network((255 * pixels).round().to(torch.uint8))[0])  # it takes uint8 only

    return FeatureNetwork("inception", weights_sha256(network), INCEPTION_SIZE, NONE, embed, _device())


def _chunks(images: Images, name: str) -> Iterator[Images]:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(f"images is {images.dtype} {images.shape}; expected at least one image, uint8 (N, H, W, 3)")
    with progress_bar(len(images), f"measuring with {name}", "image") as bar:
        for start in range(0, len(images), CHUNK):
            yield images[start : start + CHUNK]
            bar.update(min(CHUNK, len(images) - start))


def _device() -> torch.device:
    return cast(torch.device, PartialState().device)
