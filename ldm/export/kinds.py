"""The kinds of pipelines that a stage can become: a record of names each, and no code of any of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from ldm.conditioners.text import KEYWORDS
from ldm.config import StageConfig
from ldm.models.scheduler import build_scheduler
from ldm.stage import ConditionedDenoiser, Stage

MODEL = "model."
"""What the paths of trained parts begin with; see `PipelineKind.components`."""


@dataclass(frozen=True)
class PipelineKind:
    """A pipeline by the names of its classes and parts; adding a pipeline is one more of these, see `register`."""

    own: str
    """Our class."""
    stock: str
    """The class of diffusers that loads the same folder, as ``model_index.json`` names it."""
    space: str
    """``space.kind`` of its stages."""
    denoiser: str
    """Class of the denoiser."""
    conditions: Mapping[str, Collection[str]]
    """The denoiser's keywords that it sets, by conditioner; as `Conditioner.keywords`."""
    components: Mapping[str, str]
    """Where each component is found in a stage: ``space...``, or ``model...``, which is trained."""
    asks: str
    """The keyword of its call that says what to sample."""
    task: str
    """What the Hub calls it."""
    stock_arguments: str = ""
    """More of the stock class's call, to make the same images; as Python."""
    stock_note: str = ""
    """How the stock class differs, as the end of a heading."""
    sampler_notes: Mapping[str, str] = field(default_factory=dict)
    """The same for a ``sampler.kind`` alone."""
    stock_samples: bool = True
    """Whether the stock class samples such a stage at all."""
    stock_equal: bool = True
    """Whether it then makes the same images."""

    def fits(self, stage: Stage, space: str) -> bool:
        """Return whether it samples a stage in that ``space.kind``, with all that the denoiser is conditioned on."""
        model = stage.model
        conditions = {name: model.conditioner(name).keywords for name in model.conditioners}
        return (self.space, self.denoiser, self.conditions) == (space, type(model.denoiser).__name__, conditions)

    @property
    def trained(self) -> dict[str, str]:
        """Return what the names of the weights of each trained component begin with in the trained module."""
        paths = {name: path for name, path in self.components.items() if path.startswith(MODEL)}
        return {name: f"{path.removeprefix(MODEL)}." for name, path in paths.items()}

    def __str__(self) -> str:
        """Return the stages that it samples, as a config has them."""
        conditions = [f"conditioners.{name} with keywords {keywords}" for name, keywords in self.conditions.items()]
        return f"space.kind {self.space} with a {self.denoiser} and {' and '.join(conditions) or 'no conditioner'}"


_TEXT = {"text_encoder": "model.conditioners.text.text_encoder", "tokenizer": "model.conditioners.text.tokenizer"}
_CLIPPED = (
    ", whose images are other and worse ones: where DDIM clips its estimate of the image, `DDPMPipeline` goes on with "
    "noise that does not lead there. `DDIMPipeline(pipe.unet, pipe.scheduler)` makes our images if "
    "its call gets `use_clipped_model_output=True`"
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
        sampler_notes={"ddim": _CLIPPED},
        stock_equal=False,
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
        stock_samples=False,
        stock_equal=False,
    ),
]
"""In the order in which they are looked through."""


def kind_of(stage: Stage, space: str) -> PipelineKind:
    """Return the kind that samples `stage` in ``space.kind: space``; ValueError, which lists all, if none does."""
    for kind in KINDS:
        if kind.fits(stage, space):
            return kind
    model = stage.model
    conditions = [f"{name} with keywords {model.conditioner(name).keywords}" for name in model.conditioners]
    raise ValueError(
        f"no pipeline samples a {type(model.denoiser).__name__} in space.kind {space} that is conditioned on "
        f"{' and '.join(conditions) or 'nothing'}; expected one of:\n  " + "\n  ".join(map(str, KINDS))
    )


def kinds_named(stock: str) -> list[PipelineKind]:
    """Return the kinds whose folders name the class `stock` in ``model_index.json``; none for pipelines of others."""
    return [kind for kind in KINDS if kind.stock == stock]


def build_pipeline(
    kind: PipelineKind,
    stage: Stage,
    averaged: ConditionedDenoiser,
    config: StageConfig,
    pipelines: Mapping[str, Callable[..., Any]],
) -> Any:
    """Return the pipeline of a stage with the `averaged` weights as they stand, and no progress bar of its own.

    pipelines: the classes by their names. They are not of this package, because they travel without it.
    """
    parts = SimpleNamespace(space=stage.space, model=averaged)
    components = {name: attrgetter(path)(parts) for name, path in kind.components.items()}
    scheduler = build_scheduler(config.objective, config.sampler, clip_sample=stage.space.clipped)
    pipeline = pipelines[kind.own](**components, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
