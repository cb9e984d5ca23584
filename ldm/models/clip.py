"""CLIP: built from scratch or loaded, and its image encoder, frozen, as other stages use it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ldm.config import ClipNetworkConfig
from ldm.errors import ConfigError, explained
from ldm.models.component import find_component
from ldm.models.foreign import own_code_refused, refuse_strange_shards
from ldm.models.network import built, network_hash, refuse_unknown, without_float16
from ldm.models.quiet import HALF_A_CLIP, quietly
from ldm.models.text_encoder import load_tokenizer, token_settings, train_tokenizer

CHUNK = 256
"""Images or captions that are encoded at once where no gradient is needed."""
SHARED = ("projection_dim", "logit_scale_init_value")
"""Keys of the encoders' configs that `ClipNetworkConfig` decides."""
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
}
"""The settings of ``CLIPProcessor`` that do as `normalised`."""


def normalised(pixel_values: Tensor, size: int) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] as a CLIP takes them: (B, 3, size, size), of OpenAI's mean and std."""
    if pixel_values.shape[-2:] != (size, size):
        pixel_values = F.interpolate(pixel_values, size=(size, size), mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(of, device=pixel_values.device).view(1, 3, 1, 1) for of in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return ((pixel_values.clamp(-1, 1) + 1) / 2 - mean) / std


class ImageEncoder(nn.Module):
    """A frozen CLIP vision model with projection, from images in [-1, 1] to embeddings."""

    def __init__(self, network: CLIPVisionModelWithProjection):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    @property
    def key(self) -> str:
        """A name for what it computes: equal names, equal embeddings of equal images."""
        return network_hash(self.network)

    @property
    def device(self) -> torch.device:
        """The device that it is on."""
        device: torch.device = next(self.network.parameters()).device
        return device

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the embeddings, (B, D) float32, of images (B, 3, H, W) in [-1, 1] of any size."""
        return self._embeds(normalised(pixel_values.to(self.device), self.network.config.image_size))

    @torch.no_grad()
    def zero_picture(self) -> Tensor:
        """Return the embedding, (D,), of an image that is zero everywhere once normalised: Kandinsky's null."""
        size = self.network.config.image_size
        return self._embeds(torch.zeros(1, 3, size, size, device=self.device))[0]

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stay in eval mode."""
        return super().train(False)

    def _embeds(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network(images.to(self.network.dtype)).image_embeds.float())


@quietly(*HALF_A_CLIP)
def load_image_encoder(pretrained: str, where: str) -> ImageEncoder:
    """Return the image encoder in a folder or on the Hub (``user/name@revision`` too), alone, in a CLIP or a pipeline.

    A ConfigError names the config path `where`.
    """
    with explained(where):
        place, keywords = find_component(pretrained, ("image_encoder",))
        refuse_strange_shards(Path(place, keywords.get("subfolder", "")))
        network = CLIPVisionModelWithProjection.from_pretrained(
            place, use_safetensors=True, trust_remote_code=False, **keywords
        )
    return ImageEncoder(without_float16(network))


def build_clip(
    config: ClipNetworkConfig, captions: Iterable[str], tokenizer: Any | None = None
) -> tuple[CLIPModel, Any]:
    """Return ``(clip, tokenizer)``, from scratch or pretrained as `config` says.

    From scratch, the tokenizer is learned from `captions`, which must be those of the training split only. A given
    `tokenizer` takes the place of the learned or pretrained one.
    """
    if config.pretrained is not None:
        clip, tokenizer = load_clip(config.pretrained, "clip.pretrained", tokenizer)
        longest = clip.config.text_config.max_position_embeddings
        if config.max_length > longest:
            reads = f"{config.pretrained} reads at most {longest} tokens"
            raise ConfigError(f"clip.max_length: got {config.max_length}; {reads}")
        tokenizer.model_max_length = config.max_length
        return clip, tokenizer
    if tokenizer is None:
        tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length)
    ours = token_settings(tokenizer, config.max_length)
    parts = {"text": (CLIPTextConfig, config.text, ours), "vision": (CLIPVisionConfig, config.vision, {})}
    for name, (kind, keys, decided) in parts.items():
        allowed = set(inspect.signature(kind).parameters) - decided.keys() - set(SHARED)
        refuse_unknown(dict(keys), allowed, f"clip.{name}", f"of {kind.__name__}, or one that is decided elsewhere")
    shared = {"projection_dim": config.projection_dim}  # the encoders alone look for it in their own configs

    def made() -> CLIPModel:
        text, vision = (kind(**keys, **decided, **shared) for kind, keys, decided in parts.values())
        return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), **shared))

    return built(made, "clip", "CLIPModel"), tokenizer


@quietly()
def load_clip(pretrained: str, where: str, tokenizer: Any | None = None) -> tuple[CLIPModel, Any]:
    """Return ``(clip, tokenizer)`` from a folder or the Hub (``user/name@revision`` too), float32.

    A given `tokenizer` takes the place of the found one. A ConfigError names `where`, a config path or an option.
    """
    expected = f"{where}: {pretrained} is no CLIP that can be loaded; expected the folder or Hub name of a CLIPModel"
    with explained(expected), own_code_refused(where, pretrained):
        place, keywords = find_component(pretrained, ("clip",))
        refuse_strange_shards(Path(place, keywords.get("subfolder", "")))
        clip = CLIPModel.from_pretrained(place, use_safetensors=True, trust_remote_code=False, **keywords)
        tokenizer = tokenizer or load_tokenizer(pretrained)
    tokenizer.model_max_length = min(tokenizer.model_max_length, clip.config.text_config.max_position_embeddings)
    return clip.float(), tokenizer


@torch.no_grad()
def embedded_images(clip: CLIPModel, pixel_values: Tensor) -> Tensor:
    """Return the embeddings, (N, D) float32 of unit length, on the CPU, of images (N, 3, H, W) in [-1, 1]."""
    size = clip.config.vision_config.image_size
    parts = [normalised(part.to(clip.device, clip.dtype), size) for part in torch.split(pixel_values, CHUNK)]
    return _unit([clip.get_image_features(pixel_values=part) for part in parts])


@torch.no_grad()
def embedded_captions(clip: CLIPModel, tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Return the embeddings, (N, D) float32 of unit length, on the CPU, of captions."""
    parts = torch.split(token_ids(tokenizer, captions), CHUNK)
    return _unit([clip.get_text_features(input_ids=part.to(clip.device)) for part in parts])


def token_ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Return the token ids of captions, (N, max_length) int64, padded and cut."""
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    return cast(Tensor, tokens.input_ids)


def _unit(outputs: Sequence[Any]) -> Tensor:
    # transformers 5 returns a whole output
    pooled = torch.cat([getattr(output, "pooler_output", output) for output in outputs])
    return F.normalize(pooled.float().cpu(), dim=1)


def save_clip(clip: CLIPModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a CLIP, its tokenizer and the settings of ``CLIPProcessor`` into `folder`; `clip` is changed to `dtype`."""
    clip.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_preprocessor(folder, clip.config.vision_config.image_size)


def save_preprocessor(folder: Path, size: int) -> None:
    """Write the settings of ``CLIPImageProcessor`` for images of `size` pixels into `folder`."""
    settings = PREPROCESSOR | {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
