"""The kinds of pipelines that are joined from the models of several stages: one record of names for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = tuple[str, str]
"""A value in the folder of a stage: the name of our class that the stage is saved as, and ``COMPONENT.KEY`` of a
component's ``config.json``, or a key of ``model_index.json``, where those that a stock class does not know begin with
an underscore."""
SET = object()
"""Any value but null."""


@dataclass(frozen=True)
class SystemKind:
    """A pipeline of several stages. To add one, add one of these to `SYSTEMS`."""

    own: str
    """Name of our class."""
    components: Mapping[str, Mapping[str, str]]
    """By the class that a stage is saved as: the name of each of its components in the joined pipeline. Those of one
    name, of several stages, must be equal."""
    stock: str | None = None
    """Name of diffusers' class that loads the same folder; None: there is none. The folder is saved as that, and the
    names of `settings` begin with an underscore in it: they are our own."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """The class that components must have for the stock class, by their names in the joined pipeline."""
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By the class that a stage is saved as: values that fields of its config must have, `SET`: any but null."""
    image_processors: Mapping[str, str] = field(default_factory=dict)
    """The name of each image processor, and that of the image encoder whose images it prepares."""
    settings: Mapping[str, Value] = field(default_factory=dict)
    """The value of each entry of its config."""
    reader: str = "CLIPs"
    """The noun, in the plural, of the pretrained network that all stages are trained with."""
    equal: Sequence[tuple[str, Value, Value]] = ()
    """Values that must be equal, each pair with a noun."""

    def wanted_classes(self) -> Iterator[tuple[str, str, str]]:
        """Yield, for each of `classes`, the class that the stage is saved as, its component and the wanted class."""
        for kind, names in self.components.items():
            for own, joined in names.items():
                if joined in self.classes:
                    yield kind, own, self.classes[joined]


_READER = {"text_encoder": "text_encoder", "tokenizer": "tokenizer"}
"""A text encoder that all stages read with."""
SYSTEMS = {
    kind.own: kind
    for kind in (
        SystemKind(
            own="UnCLIPPipeline",
            components={
                "PriorPipeline": {"prior": "prior", "scheduler": "prior_scheduler", **_READER},
                "DecoderPipeline": {
                    "unet": "decoder",
                    "scheduler": "decoder_scheduler",
                    "image_encoder": "image_encoder",
                    **_READER,
                },
                "UpsamplerPipeline": {"unet": "super_res", "scheduler": "super_res_scheduler"},
            },
            settings={
                "small_size": ("UpsamplerPipeline", "small_size"),
                "null_image_embeds": ("DecoderPipeline", "null_image_embeds"),
                "prior_num_inference_steps": ("PriorPipeline", "num_inference_steps"),
                "prior_guidance_scale": ("PriorPipeline", "guidance_scale"),
                "decoder_num_inference_steps": ("DecoderPipeline", "num_inference_steps"),
                "decoder_guidance_scale": ("DecoderPipeline", "guidance_scale"),
                "super_res_num_inference_steps": ("UpsamplerPipeline", "num_inference_steps"),
            },
            equal=(
                (
                    "width of the image embeddings",
                    ("PriorPipeline", "prior.embedding_dim"),
                    ("DecoderPipeline", "unet.cross_attention_dim"),
                ),
                (
                    "size of the small images",
                    ("DecoderPipeline", "unet.sample_size"),
                    ("UpsamplerPipeline", "small_size"),
                ),
            ),
        ),
        SystemKind(
            own="ImagenPipeline",
            reader="text encoders",
            settings={
                "noise_timesteps": ("IFSuperResolutionPipeline", "_noise_timesteps"),
                "num_inference_steps": ("IFPipeline", "_num_inference_steps"),
                "guidance_scale": ("IFPipeline", "_guidance_scale"),
                "super_res_num_inference_steps": ("IFSuperResolutionPipeline", "_num_inference_steps"),
                "super_res_guidance_scale": ("IFSuperResolutionPipeline", "_guidance_scale"),
            },
            equal=(
                (
                    "size of the small images",
                    ("IFPipeline", "unet.sample_size"),
                    ("IFSuperResolutionPipeline", "_small_size"),
                ),
            ),
            components={
                "IFPipeline": {"unet": "unet", "scheduler": "scheduler", **_READER},
                "IFSuperResolutionPipeline": {
                    "unet": "super_res",
                    "scheduler": "super_res_scheduler",
                    "image_noising_scheduler": "image_noising_scheduler",
                    **_READER,
                },
            },
        ),
        SystemKind(
            own="KandinskyPipeline",
            stock="KandinskyV22CombinedPipeline",
            classes={"prior_scheduler": "UnCLIPScheduler"},
            fields={
                "PriorPipeline": {"sampler.kind": "unclip"},
                "LatentDecoderPipeline": {
                    "conditioners.image.null": "zero_picture",
                    "objective.variational_weight": SET,
                },
            },
            components={
                "PriorPipeline": {
                    "prior": "prior_prior",
                    "scheduler": "prior_scheduler",
                    "text_encoder": "prior_text_encoder",
                    "tokenizer": "prior_tokenizer",
                },
                "LatentDecoderPipeline": {
                    "unet": "unet",
                    "scheduler": "scheduler",
                    "movq": "movq",
                    "image_encoder": "prior_image_encoder",
                },
            },
            image_processors={"prior_image_processor": "prior_image_encoder"},
            settings={
                "num_inference_steps": ("LatentDecoderPipeline", "num_inference_steps"),
                "guidance_scale": ("LatentDecoderPipeline", "guidance_scale"),
                "prior_num_inference_steps": ("PriorPipeline", "num_inference_steps"),
                "prior_guidance_scale": ("PriorPipeline", "guidance_scale"),
            },
            equal=(
                (
                    "width of the image embeddings",
                    ("PriorPipeline", "prior.embedding_dim"),
                    ("LatentDecoderPipeline", "unet.encoder_hid_dim"),
                ),
            ),
        ),
    )
}
"""All kinds, by the name of our class."""
