"""Text to image with a transformer, in the layout of PixArt."""

from pathlib import Path
from typing import ClassVar

from diffusers import AutoencoderKL, DiffusionPipeline, PixArtTransformer2DModel, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .prompted import Prompted
from .schedulers import check_scheduler
from .source import Portable, single_file


class TransformerPipeline(
    Portable,
    Prompted,
    DiffusionPipeline,  # type: ignore[misc]
):
    """The text-to-image pipeline with a transformer: images of prompts like `PixArtAlphaPipeline`'s (Chen et al. 2023).

    It has the components of that class, with a text encoder of any kind, and that class can load a saved folder. With
    the same components and the same noise, both give the same images if the stock pipeline is called with
    ``use_resolution_binning=False, clean_caption=False, max_sequence_length=pipe.tokenizer.model_max_length``, if
    prompts are in lower case (it lowers them), and if the denoiser takes no micro-conditions. Every input is checked.

    The transformer gets a mask of the padding tokens; in prompt embeddings, rows of zeros are padding.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["tokenizer", "text_encoder"]
    _denoiser: ClassVar[str] = "transformer"
    _zero_padding: ClassVar[bool] = True
    _stock: ClassVar[str] = "PixArtAlphaPipeline"
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        vae: AutoencoderKL,
        transformer: PixArtTransformer2DModel,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        if transformer is not None and transformer.use_additional_conditions:
            raise ValueError("transformer: conditioned on image sizes; build it with use_additional_conditions=False")
        if scheduler is not None and transformer is not None:
            check_scheduler(scheduler, transformer.config.in_channels, transformer.config.out_channels)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
