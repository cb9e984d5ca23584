"""The decoder: from the CLIP embedding of an image, and a text, to an image (Ramesh et al. 2022, section 2.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from .cascade import Sampling, decoded_images
from .inputs import check_output
from .sampling import StepCallback
from .source import Portable, single_file
from .stages import (
    both_texts,
    callback_steps,
    check_decoder,
    given_embeds,
    image_output,
    null_image_embeds,
    said,
    stage_call,
    text_embeds,
)


class DecoderPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """The pipeline of a decoder in pixel space: images of image embeddings and prompts.

    image_encoder, text_encoder: of one CLIP. null_image_embeds: the embedding of no image, in guidance and where none
    is given, as in training: "zeros", or "zero_picture". num_inference_steps, guidance_scale: of a call that says none.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet"
    _stock: ClassVar[str | None] = None
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        unet: UNet2DConditionModel,
        image_encoder: CLIPVisionModelWithProjection,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
        null_image_embeds: str = "zeros",
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_decoder("unet", unet, image_encoder, text_encoder)
        self.register_modules(
            unet=unet,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        self.register_to_config(
            null_image_embeds=null_image_embeds, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        image: Any = None,
        image_embeds: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Return ``.images``, one for each prompt and embedding; ``(images,)`` if not `return_dict`.

        image: PIL images, arrays or tensors (`given_images`), whose embeddings are taken; or image_embeds: those, (B,
        D). Neither: the null. One prompt or one embedding goes with all of the other.
        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent": "pt" in [-1, 1], not clipped.
        guidance_scale: up to 1 there is no guidance. It and the steps are by default those of the config.
        generator: with a list, image i depends on generator i only.
        callback_on_step_end: gets ``latents``, the noisy images. ValueError for unusable inputs.
        """
        self._interrupt = False
        steps, scale = said(self, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        stage_call("", self.scheduler, self.unet, steps, scale)
        check_output(output_type, return_dict)
        given, null = both_texts(self, prompt, negative_prompt)
        nothing = null_image_embeds(self, self.unet.config.cross_attention_dim)
        embeds = given_embeds(self, image, image_embeds, nothing)
        count = max(len(embeds), len(given.pooled))
        if {len(embeds), len(given.pooled)} - {1, count}:
            raise ValueError(f"prompt: got {len(given.pooled)} for {len(embeds)} image embeddings; expected as many")
        pair = embeds.expand(count, -1), given.rows(count)
        after_step = callback_steps(self, callback_on_step_end)
        how = Sampling(steps, scale, self.progress_bar, after_step)
        x0 = decoded_images(self.unet, self.scheduler, pair, (nothing, null), how, generator)
        return image_output(self, x0, output_type, return_dict)

    @torch.no_grad()
    def encode_prompt(self, prompt: str, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states, (1, L, D), of a prompt and of no prompt."""
        one, other = (text_embeds("prompt", [text], self) for text in (prompt, ""))
        return one.states, other.states
