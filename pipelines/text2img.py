"""Text to image, in the layout of Stable Diffusion."""

from pathlib import Path
from typing import ClassVar

from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from .prompted import Prompted
from .schedulers import check_scheduler
from .source import Portable, single_file


class TextToImagePipeline(
    Portable,
    Prompted,
    DiffusionPipeline,  # type: ignore[misc]
    StableDiffusionMixin,  # type: ignore[misc]
    TextualInversionLoaderMixin,  # type: ignore[misc]
    StableDiffusionLoraLoaderMixin,  # type: ignore[misc]
):
    """The text-to-image pipeline: images of prompts like `StableDiffusionPipeline`'s, with every input checked.

    It has the components of that class, and both can load a saved folder. ``from_pretrained(folder)`` of
    `DiffusionPipeline` returns the stock pipeline; ``from_pretrained(folder, custom_pipeline=folder,
    trust_remote_code=True)`` returns this one, from its source in the folder. With the same components and the same
    noise, both give the same images.

    It adds to the stock pipeline: denoisers with a learned variance (twice the latent channels); ValueError for
    schedulers that would run but sample wrongly (`check_scheduler`); FloatingPointError in place of black images.

    text_encoder: its first output, (B, L, D), is the prompt embeddings. It gets the attention mask if its config has
    `use_attention_mask`, as BERT-like encoders need. safety_checker: must be None. Components that a call does not use
    may be None.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "image_encoder"]
    _denoiser: ClassVar[str] = "unet"
    _stock: ClassVar[str] = "StableDiffusionPipeline"
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: PreTrainedModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        image_encoder: PreTrainedModel | None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__()
        if safety_checker is not None:
            raise ValueError("TextToImagePipeline runs no safety checker: pass safety_checker=None")
        if unet is not None and unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError("unet: it is conditioned on the guidance scale (time_cond_proj_dim); build it without")
        if scheduler is not None:
            # as the stock class does, so that both give the same images
            stock = {"steps_offset": 1, "clip_sample": False}
            scheduler.register_to_config(**{key: value for key, value in stock.items() if key in scheduler.config})
        if scheduler is not None and unet is not None:
            check_scheduler(scheduler, unet.config.in_channels, unet.config.out_channels)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
