"""The decoder of Kandinsky 2.2: from the CLIP embedding of an image to an image, by way of latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel, VQModel
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPVisionModelWithProjection

from .cascade import Sampling, latents_or_images
from .inputs import check_output
from .sampling import StepCallback
from .source import Portable, single_file
from .stages import (
    callback_steps,
    check_latent_decoder,
    given_embeds,
    image_output,
    said,
    stage_call,
    zero_image_embeds,
)


class LatentDecoderPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """The pipeline of a decoder in the latent space of a MoVQ: images of image embeddings alone.

    image_encoder: the CLIP's whose embeddings it was trained on. null_image_embeds: as in training; "zero_picture", the
    embedding of a zero image, because the pipelines of diffusers guide with that. num_inference_steps, guidance_scale:
    of a call that says none.
    """

    model_cpu_offload_seq = "image_encoder->unet->movq"
    _stock: ClassVar[str | None] = None
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        unet: UNet2DConditionModel,
        movq: VQModel,
        image_encoder: CLIPVisionModelWithProjection,
        scheduler: SchedulerMixin,
        null_image_embeds: str = "zero_picture",
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_latent_decoder(unet, movq, image_encoder, scheduler)
        if null_image_embeds != "zero_picture":
            raise ValueError(
                f"null_image_embeds: got {null_image_embeds!r}; expected 'zero_picture' (conditioners.image.null), "
                "which the pipelines of Kandinsky guide with"
            )
        self.register_modules(unet=unet, movq=movq, image_encoder=image_encoder, scheduler=scheduler)
        self.register_to_config(
            null_image_embeds=null_image_embeds, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Return ``.images``, one for each image or embedding; ``(images,)`` if not `return_dict`.

        image: PIL images, arrays or tensors (`given_images`), whose embeddings are taken; or embeddings, a tensor (B,
        D). output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent": the latents.
        guidance_scale: up to 1 there is no guidance. It and the steps are by default those of the config.
        generator: with a list, image i depends on generator i only.
        callback_on_step_end: gets ``latents``. ValueError for unusable inputs.
        """
        self._interrupt = False
        steps, scale = said(self, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        stage_call("", self.scheduler, self.unet, steps, scale, latents=True)
        check_output(output_type, return_dict)
        null = zero_image_embeds(self.image_encoder, self._execution_device)
        given, embeds = (None, image) if torch.is_tensor(image) and image.ndim == 2 else (image, None)
        embeds = given_embeds(self, given, embeds, null, "image")
        how = Sampling(steps, scale, self.progress_bar, callback_steps(self, callback_on_step_end))
        x0 = latents_or_images(self, embeds, null, how, generator, output_type)
        return image_output(self, x0, output_type, return_dict)
