"""The kinds of pipelines that a stage can be saved as: one record of names for each, without their code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, Literal

from ldm.conditioners.text import KEYWORDS
from ldm.config import StageConfig
from ldm.errors import ConfigError
from ldm.models.scheduler import build_scheduler
from ldm.stage import ConditionedDenoiser, Stage

MODEL = "model."
"""Prefix of the paths of trained parts; see `PipelineKind.components`."""


@dataclass(frozen=True)
class PipelineKind:
    """A pipeline by the names of its classes and parts. To add a pipeline, add one of these to `KINDS`."""

    own: str
    """Name of our class."""
    stock: str
    """Name of diffusers' class that loads the same folder, as in ``model_index.json``."""
    space: str
    """``space.kind`` of its stages."""
    denoiser: str
    """Name of the denoiser's class."""
    conditions: Mapping[str, Collection[str]]
    """The denoiser's keywords that each conditioner sets, in any order. A mapping also says which output of the text
    encoder each is set to, as `TextConditioner.keywords`."""
    components: Mapping[str, str]
    """The path of each component in a stage: ``space...``, or ``model...`` for the trained ones."""
    asks: str
    """The keyword of its call that says what to sample, as in `ldm.evaluation.conditions.CONDITIONS`."""
    task: str
    """The Hub's name of its task."""
    stock_arguments: str = ""
    """Arguments, as Python, that the stock class's call needs to make the same images."""
    stock_note: str = ""
    """A note on the stock class, which continues the words "With diffusers alone" on the card."""
    stock_samplers: Collection[str] = ("dpm_solver", "ddim", "ddpm")
    """Each ``sampler.kind`` with which the stock class makes the same images as ours."""
    stock_learned: Collection[str] = ()
    """Those of a denoiser with a learned variance."""
    stock_others: Mapping[str, str] = field(default_factory=dict)
    """Each ``sampler.kind`` with which the stock class makes other images, if the variance is not learned. The value is
    a note that says so, in the place of `stock_note`."""

    def stock_images(self, config: StageConfig) -> Literal["same", "other", "none"]:
        """Return "same" if the stock class makes the same images as ours, "other" if a note says how they differ.

        Else "none": it cannot sample such a stage, or guides its learned variance, too.
        """
        sampler, learned = config.sampler.kind, config.objective.variational_weight is not None
        if sampler in (self.stock_learned if learned else self.stock_samplers):
            return "same"
        return "other" if sampler in self.stock_others and not learned else "none"

    def fits(self, stage: Stage, space: str) -> bool:
        """Return whether it samples `stage` in that ``space.kind``: denoiser and conditioners are the same."""
        model = stage.model
        return (self.space, self.denoiser) == (space, type(model.denoiser).__name__) and (
            self.conditions.keys() == set(model.conditioners)
            and all(_are(model.conditioner(name).keywords, wanted) for name, wanted in self.conditions.items())
        )

    @property
    def trained(self) -> dict[str, str]:
        """Return the trained components, each with the prefix of its weights' names in the trained module."""
        paths = {name: path for name, path in self.components.items() if path.startswith(MODEL)}
        return {name: f"{path.removeprefix(MODEL)}." for name, path in paths.items()}

    def __str__(self) -> str:
        """Return the stages that it samples, in the words of a config."""
        conditions = [f"conditioners.{name} with keywords {keywords}" for name, keywords in self.conditions.items()]
        return f"space.kind {self.space} with a {self.denoiser} and {' and '.join(conditions) or 'no conditioner'}"


def _are(keywords: Collection[str], wanted: Collection[str]) -> bool:
    return keywords == wanted if isinstance(wanted, Mapping) else set(keywords) == set(wanted)


_TEXT = {"text_encoder": "model.conditioners.text.text_encoder", "tokenizer": "model.conditioners.text.tokenizer"}
_CLIPPED = (
    ", whose images are different and worse: DDIM clips its estimate of the image, and `DDPMPipeline` then continues "
    "with noise that does not belong to the clipped image. `DDIMPipeline(pipe.unet, pipe.scheduler)` makes the same "
    "images as ours if its call gets `use_clipped_model_output=True`"
)
KINDS = [
    PipelineKind(
        own="TextToImagePipeline",
        stock="StableDiffusionPipeline",
        space="latent",
        denoiser="UNet2DConditionModel",
        conditions={"text": KEYWORDS},
        components={"vae": "space.autoencoder", "unet": "model.denoiser", **_TEXT},
        asks="prompt",
        task="text-to-image",
    ),
    PipelineKind(
        own="TransformerPipeline",
        stock="PixArtAlphaPipeline",
        space="latent",
        denoiser="PixArtTransformer2DModel",
        conditions={"text": {**KEYWORDS, "encoder_attention_mask": "attention_mask"}},
        components={"vae": "space.autoencoder", "transformer": "model.denoiser", **_TEXT},
        asks="prompt",
        task="text-to-image",
        stock_arguments=", use_resolution_binning=False, max_sequence_length={max_length}, clean_caption=False",
        stock_note=", which reads captions in lower case",
        stock_learned=("dpm_solver", "ddim"),
    ),
    PipelineKind(
        own="PixelPipeline",
        stock="DDPMPipeline",
        space="pixel",
        denoiser="UNet2DModel",
        conditions={},
        components={"unet": "model.denoiser"},
        asks="batch_size",
        task="unconditional-image-generation",
        stock_samplers=("dpm_solver", "ddpm"),
        stock_learned=("ddpm",),
        stock_others={"ddim": _CLIPPED},
    ),
    PipelineKind(
        own="PixelPipeline",
        stock="DDPMPipeline",
        space="pixel",
        denoiser="UNet2DModel",
        conditions={"label": ("class_labels",)},
        components={"unet": "model.denoiser"},
        asks="class_labels",
        task="unconditional-image-generation",
        stock_samplers=(),
    ),
]
"""All kinds; the first that fits is used."""


def kind_of(stage: Stage, space: str) -> PipelineKind:
    """Return the kind that samples `stage` in ``space.kind: space``; ValueError, which lists all, if none does."""
    for kind in KINDS:
        if kind.fits(stage, space):
            return kind
    model = stage.model
    conditions = [f"{name} with keywords {model.conditioner(name).keywords}" for name in model.conditioners]
    raise ConfigError(
        f"no pipeline samples a {type(model.denoiser).__name__} in space.kind {space} that is conditioned on "
        f"{' and '.join(conditions) or 'nothing'}; expected one of:\n  " + "\n  ".join(map(str, KINDS))
    )


def kinds_named(stock: str) -> list[PipelineKind]:
    """Return the kinds whose folders name the class `stock` in ``model_index.json``; [] for other pipelines."""
    return [kind for kind in KINDS if kind.stock == stock]


def build_pipeline(
    kind: PipelineKind,
    stage: Stage,
    averaged: ConditionedDenoiser,
    config: StageConfig,
    pipelines: Mapping[str, Callable[..., Any]],
) -> Any:
    """Return the pipeline of a stage with the current `averaged` weights, without a progress bar.

    pipelines: the classes by name. They are not in this package, because they are published without it.
    """
    parts = SimpleNamespace(space=stage.space, model=averaged)
    components = {name: attrgetter(path)(parts) for name, path in kind.components.items()}
    scheduler = build_scheduler(config.objective, config.sampler, clip_sample=stage.space.clipped)
    pipeline = pipelines[kind.own](**components, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
