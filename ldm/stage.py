"""The one place where parts are put together: space + denoiser + objective + conditioners."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.conditioners.conditioning import Conditioner, Conditions, Inputs, merge, nested, refuse_collisions
from ldm.conditioners.frames import FramesConditioner
from ldm.conditioners.image import ImageConditioner
from ldm.conditioners.label import LabelConditioner
from ldm.conditioners.low_res import LowResConditioner
from ldm.conditioners.text import TextConditioner
from ldm.config import StageConfig
from ldm.config.conditioners import ConditionersConfig
from ldm.config.places import pretrained_place
from ldm.errors import ConfigError, explained
from ldm.models.clip import load_image_encoder
from ldm.models.network import DENOISERS, build_network, keep_statistics, prepare_denoiser, with_temporal_layers
from ldm.models.temporal import VideoUNet
from ldm.models.text_encoder import build_text_encoder
from ldm.objectives.denoising import Objective
from ldm.spaces import Space, build_space


class ConditionedDenoiser(nn.Module):
    """The trained module: conditioners and denoiser behind one forward, so that every process sees the same graph."""

    def __init__(self, denoiser: nn.Module, conditioners: Mapping[str, nn.Module]):
        """Raise ValueError if two conditioners set the same keyword of the denoiser."""
        super().__init__()
        self.denoiser = denoiser
        self.conditioners = nn.ModuleDict(conditioners)
        refuse_collisions([self.conditioner(name).keywords for name in conditioners])
        wanted = [p for p in inspect.signature(denoiser.forward).parameters.values() if p.kind != p.VAR_KEYWORD][1:]
        self._unset = {p.name: None for p in wanted if p.default is p.empty and p.name != "timestep"}

    def forward(self, x_t: Tensor, timesteps: Tensor, inputs: Mapping[str, Inputs]) -> Tensor:
        """Return ``model_output``, (B, C or 2C, ...), for noisy `x_t` at the network's `timesteps`."""
        conditions = self.conditions(inputs)
        output: Tensor = self.denoiser(
            torch.cat([x_t, *conditions.channels], 1), timestep=timesteps, **conditions.kwargs, return_dict=False
        )[0]
        return output

    def conditions(self, inputs: Mapping[str, Inputs]) -> Conditions:
        """Return the channels and keyword arguments that all conditioners add to a call of the denoiser.

        An argument that the denoiser requires and no conditioner sets is None.
        """
        merged = merge([self.conditioners[name](**inputs[name]) for name in self.conditioners])
        return Conditions(merged.channels, self._unset | nested(merged.kwargs))

    def encoders(self) -> list[nn.Module]:
        """Return the networks of the conditioners that are trained with the denoiser."""
        conditioners = map(self.conditioner, self.conditioners)
        return [network for one in conditioners if not one.frozen for network in one.networks]

    @property
    def reads_pixels(self) -> bool:
        """True if a conditioner needs the images themselves."""
        return any(self.conditioner(name).reads_pixels for name in self.conditioners)

    def conditioner(self, name: str) -> Conditioner:
        """Return conditioner `name`."""
        return cast(Conditioner, self.conditioners[name])


@dataclass(frozen=True)
class Stage:
    """A model to train, the space it works in, and its objective."""

    space: Space
    model: ConditionedDenoiser
    objective: Objective


def build_stage(
    config: StageConfig,
    captions: Sequence[str],
    images: Callable[[], Tensor] | None = None,
    tokenizer: Any | None = None,
) -> Stage:
    """Return the stage that `config` describes.

    Weights are initialised with the global generator, which is seeded with ``config.seed`` here.

    Args:
        config: The stage's config.
        captions: All captions of the training split; the tokenizer is learned from them unless one is given.
        images: Returns training images, (N, 3, H, W), for the statistics of an embedding space.
        tokenizer: Takes the place of a learned or a pretrained one.

    """
    torch.manual_seed(config.seed)
    space = build_space(config.space, images)
    conditioners = build_conditioners(config.conditioners, captions, tokenizer, config.data.image_size)
    denoiser = build_network(config.denoiser, "denoiser", DENOISERS)
    prepare_denoiser(denoiser, fresh="pretrained" not in config.denoiser)
    if config.temporal is not None:
        denoiser = with_temporal_layers(denoiser, config.temporal, "frames" in conditioners)
    elif isinstance(denoiser, VideoUNet):
        raise ConfigError("temporal: got null for a VideoUNet; expected settings, {} at least, and data of clips")
    if space.statistics is not None:
        keep_statistics(denoiser, *space.statistics)
    return Stage(space, ConditionedDenoiser(denoiser, conditioners), Objective(config.objective, space.grid_step))


def build_conditioners(
    config: ConditionersConfig, captions: Sequence[str], tokenizer: Any | None = None, image_size: int | None = None
) -> dict[str, nn.Module]:
    """Return the conditioners that `config` names; `captions` are those of the training split.

    A given `tokenizer` takes the place of a learned or a pretrained one. image_size: pixels of the data's images.
    """
    conditioners: dict[str, nn.Module] = {}
    if (text := config.text) is not None:
        if not captions:
            raise ConfigError("conditioners.text: no training image has a caption; name them in data.caption_column")
        encoder, tokenizer = build_text_encoder(text, captions, tokenizer)
        with explained("conditioners.text"):
            conditioners["text"] = TextConditioner(
                encoder, tokenizer, train=text.train, dropout=text.dropout, keywords=text.keywords
            )
    if (label := config.label) is not None:
        conditioners["label"] = LabelConditioner(label.num_classes, label.dropout)
    if (image := config.image) is not None:
        image_encoder = load_image_encoder(image.pretrained, "conditioners.image.pretrained")
        conditioners["image"] = ImageConditioner(image_encoder, image.null, image.dropout)
    if (low_res := config.low_res) is not None:
        conditioners["low_res"] = LowResConditioner(
            low_res.image_size, low_res.noise_timesteps, low_res.blur, image_size
        )
    if (frames := config.frames) is not None:
        conditioners["frames"] = FramesConditioner(frames.max_context, frames.dropout, frames.between)
    return conditioners


def pretrained_parts(config: StageConfig) -> list[str]:
    """Return the folder or Hub name of every part that `config` does not train from scratch."""
    text, image = config.conditioners.text, config.conditioners.image
    named = [
        config.space.autoencoder,
        config.space.image_encoder,
        pretrained_place(config.denoiser),
        text.pretrained if text else None,
        image.pretrained if image else None,
    ]
    return [name for name in named if name is not None]
