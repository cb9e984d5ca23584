"""The kinds of pipelines that a stage can be saved as: one record of names for each, without their code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, Literal

from ldm.conditioners.image import KEYWORD as IMAGE_EMBEDS
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
    stock: str | None
    """Name of diffusers' class that loads the same folder, as in ``model_index.json``; None: there is none."""
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
    """The first keyword of its call that says what to sample, as in `ldm.evaluation.conditions.CONDITIONS`."""
    task: str
    """The Hub's name of its task."""
    words: str = ""
    """Its words on a card: a key of `ldm.export.pipeline_card.WORDS`; "": `asks`."""
    samples: str = "images"
    """The name of the field of its output that is sampled, one of `ldm.evaluation.samples.SAMPLES`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The path of each value of its config in a stage, as `components`, or ``config...`` for a field of the config."""
    stock_arguments: str = ""
    """Arguments, as Python, that the stock class's call needs to make the same images."""
    stock_length: int | None = None
    """Tokens that the stock class reads of a prompt, whatever the tokenizer says; None: as the tokenizer says."""
    stock_note: str = ""
    """A note on the stock class, which continues the words "With diffusers alone" on the card."""
    stock_autoencoders: Collection[str] = ("AutoencoderKL",)
    """The classes of autoencoders that the stock class decodes with."""
    stock_samplers: Collection[str] = ("dpm_solver", "ddim", "ddpm")
    """Each ``sampler.kind`` with which the stock class makes the same images as ours."""
    stock_learned: Collection[str] = ()
    """Those of a denoiser with a learned variance."""
    stock_others: Mapping[str, str] = field(default_factory=dict)
    """Each ``sampler.kind`` with which the stock class makes other images, if the variance is not learned. The value is
    a note that says so, in the place of `stock_note`."""

    @property
    def saved_as(self) -> str | list[str]:
        """Return its ``_class_name`` in ``model_index.json``: the stock class, else our class in ``pipeline.py``."""
        return self.stock or ["pipeline", self.own]

    def stock_images(self, config: StageConfig) -> Literal["same", "other", "none"]:
        """Return "same" if the stock class makes the same images as ours, "other" if a note says how they differ.

        Else "none": it cannot sample such a stage, reads another number of tokens, guides its learned variance, too, or
        gives the denoiser embeddings in the type of the text encoder.
        """
        text = config.conditioners.text
        if text is not None and (self.stock_length not in (None, text.max_length) or text.dtype == "bfloat16"):
            return "none"
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
_STEPS = {"num_inference_steps": "config.validation.num_inference_steps"}
_GUIDANCE = {"guidance_scale": "config.validation.guidance_scale"}
_PRIOR_TEXT = {
    "encoder_hidden_states": "prompt_embeds",
    "proj_embedding": "pooled_prompt_embeds",
    "attention_mask": "attention_mask",
}
_DECODER_TEXT = {**KEYWORDS, "added_cond_kwargs.text_embeds": "pooled_prompt_embeds"}
IF_LENGTH = 77
_LOWER = ", which reads captions in lower case"
_IF_NOTE = f"{_LOWER} and hides their padding from the text encoder"
_CLIPPED = (
    ", whose images are different and worse: DDIM clips its estimate of the image, and `DDPMPipeline` then continues "
    "with noise that does not belong to the clipped image. `DDIMPipeline(pipe.unet, pipe.scheduler)` makes the same "
    "images as ours if its call gets `use_clipped_model_output=True`"
)
_VIDEO = PipelineKind(
    own="VideoPipeline",
    stock=None,
    space="latent",
    denoiser="VideoUNet",
    conditions={"text": KEYWORDS},
    components={"vae": "space.autoencoder", "unet": "model.denoiser", **_TEXT},
    settings={"num_frames": "config.data.num_frames", **_STEPS, **_GUIDANCE},
    asks="prompt",
    task="text-to-video",
    samples="frames",
    words="video",
    stock_samplers=(),
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
    _VIDEO,
    replace(
        _VIDEO,
        conditions={"text": KEYWORDS, "frames": ()},
        settings={
            "max_context": "model.conditioners.frames.max_context",
            "interpolates": "model.conditioners.frames.interpolates",
            **_VIDEO.settings,
        },
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
        stock_note=_LOWER,
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
    PipelineKind(
        own="PriorPipeline",
        stock=None,
        space="embedding",
        denoiser="PriorTransformer",
        conditions={"text": _PRIOR_TEXT},
        components={"prior": "model.denoiser", **_TEXT},
        asks="prompt",
        task="feature-extraction",
        samples="image_embeds",
        settings={**_STEPS, **_GUIDANCE},
        words="prior",
        stock_samplers=(),
    ),
    PipelineKind(
        own="DecoderPipeline",
        stock=None,
        space="pixel",
        denoiser="UNet2DConditionModel",
        conditions={"image": (IMAGE_EMBEDS,), "text": _DECODER_TEXT},
        components={
            "unet": "model.denoiser",
            "image_encoder": "model.conditioners.image.image_encoder.network",
            **_TEXT,
        },
        settings={"null_image_embeds": "model.conditioners.image.null_name", **_STEPS, **_GUIDANCE},
        asks="prompt",
        task="text-to-image",
        words="decoder",
        stock_samplers=(),
    ),
    PipelineKind(
        own="LatentDecoderPipeline",
        stock=None,
        space="latent",
        denoiser="UNet2DConditionModel",
        conditions={"image": (IMAGE_EMBEDS,)},
        components={
            "unet": "model.denoiser",
            "movq": "space.autoencoder",
            "image_encoder": "model.conditioners.image.image_encoder.network",
        },
        settings={"null_image_embeds": "model.conditioners.image.null_name", **_STEPS, **_GUIDANCE},
        asks="image",
        task="image-to-image",
        words="latent_decoder",
        stock_samplers=(),
    ),
    PipelineKind(
        own="UpsamplerPipeline",
        stock=None,
        space="pixel",
        denoiser="UNet2DModel",
        conditions={"low_res": ()},
        components={"unet": "model.denoiser"},
        settings={"small_size": "model.conditioners.low_res.image_size", **_STEPS},
        asks="image",
        task="image-to-image",
        words="upsampler",
        stock_samplers=(),
    ),
    PipelineKind(
        own="PromptedPixelPipeline",
        stock="IFPipeline",
        space="pixel",
        denoiser="UNet2DConditionModel",
        conditions={"text": KEYWORDS},
        components={"unet": "model.denoiser", **_TEXT},
        settings={**_STEPS, **_GUIDANCE},
        asks="prompt",
        task="text-to-image",
        stock_samplers=(),
        stock_learned=("dpm_solver", "ddpm"),
        stock_arguments=", clean_caption=False",
        stock_length=IF_LENGTH,
        stock_note=_IF_NOTE,
    ),
    PipelineKind(
        own="SuperResolutionPipeline",
        stock="IFSuperResolutionPipeline",
        space="pixel",
        denoiser="UNet2DConditionModel",
        conditions={"text": KEYWORDS, "low_res": ("class_labels",)},
        components={
            "unet": "model.denoiser",
            "image_noising_scheduler": "model.conditioners.low_res.noising_scheduler",
            **_TEXT,
        },
        settings={
            "small_size": "model.conditioners.low_res.image_size",
            "noise_timesteps": "model.conditioners.low_res.noise_timesteps",
            **_STEPS,
            **_GUIDANCE,
        },
        asks="prompt",
        task="image-to-image",
        words="super_resolution",
        stock_arguments=", noise_level=100, clean_caption=False",
        stock_samplers=(),
        stock_learned=("dpm_solver", "ddpm"),
        stock_length=IF_LENGTH,
        stock_note=_IF_NOTE,
    ),
]
"""All kinds; the first that fits is used."""


def kind_of(stage: Stage, space: str) -> PipelineKind:
    """Return the kind that samples `stage` in ``space.kind: space``; ValueError, which lists all, if none does.

    The stock class makes no images of a stage whose autoencoder it cannot decode with.
    """
    for kind in KINDS:
        if kind.fits(stage, space):
            autoencoder = getattr(stage.space, "autoencoder", None)
            if autoencoder is None or type(autoencoder).__name__ in kind.stock_autoencoders:
                return kind
            return replace(kind, stock_samplers=(), stock_learned=(), stock_others={})
    model = stage.model
    conditions = [f"{name} with keywords {model.conditioner(name).keywords}" for name in model.conditioners]
    raise ConfigError(
        f"no pipeline samples a {type(model.denoiser).__name__} in space.kind {space} that is conditioned on "
        f"{' and '.join(conditions) or 'nothing'}; expected one of:\n  " + "\n  ".join(map(str, KINDS))
    )


def kinds_named(name: str | list[str]) -> list[PipelineKind]:
    """Return the kinds whose folders have this ``_class_name`` in ``model_index.json``; [] for other pipelines."""
    return [kind for kind in KINDS if kind.saved_as == name]


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
    parts = SimpleNamespace(space=stage.space, model=averaged, config=config)
    components = {name: attrgetter(path)(parts) for name, path in (*kind.components.items(), *kind.settings.items())}
    scheduler = build_scheduler(config.objective, config.sampler, clip_sample=stage.space.clipped)
    pipeline = pipelines[kind.own](**components, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
