"""Text to image by the two stages of Kandinsky 2.2: a prior and a decoder in the latent space of a MoVQ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, PriorTransformer, SchedulerMixin, UNet2DConditionModel, VQModel
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from .cascade import Sampling, latents_or_images, prompt_image_embeds
from .inputs import MAX_IMAGES, check_output, whole_number
from .sampling import StepCallback
from .source import Portable, single_file
from .stages import (
    as_tensor,
    callback_steps,
    check_latent_decoder,
    check_prior,
    given_embeds,
    image_embeds,
    image_output,
    said,
    stage_call,
    zero_image_embeds,
)


class KandinskyPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """Images of prompts, and of mixtures of prompts and images (Razzhigaev et al. 2023).

    The prior predicts the CLIP embedding of an image from a prompt; the decoder samples latents of that embedding, and
    the MoVQ decodes them. The components have the names of diffusers' KandinskyV22CombinedPipeline, which loads the
    same folder; the values of the config are the settings of a call that does not say otherwise.
    """

    model_cpu_offload_seq = "prior_text_encoder->prior_image_encoder->unet->movq"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["prior_prior"]
    _stock: ClassVar[str | None] = "KandinskyV22CombinedPipeline"
    _own_settings: ClassVar[tuple[str, ...]] = (
        "num_inference_steps",
        "guidance_scale",
        "prior_num_inference_steps",
        "prior_guidance_scale",
    )
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        movq: VQModel,
        prior_prior: PriorTransformer,
        prior_image_encoder: CLIPVisionModelWithProjection,
        prior_text_encoder: CLIPTextModelWithProjection,
        prior_tokenizer: CLIPTokenizer,
        prior_scheduler: SchedulerMixin,
        prior_image_processor: Any,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_prior(prior_prior, prior_text_encoder, prior_tokenizer)
        check_latent_decoder(unet, movq, prior_image_encoder, scheduler)
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            movq=movq,
            prior_prior=prior_prior,
            prior_image_encoder=prior_image_encoder,
            prior_text_encoder=prior_text_encoder,
            prior_tokenizer=prior_tokenizer,
            prior_scheduler=prior_scheduler,
            prior_image_processor=prior_image_processor,
        )
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            prior_num_inference_steps=prior_num_inference_steps,
            prior_guidance_scale=prior_guidance_scale,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of prompts."""
        return self.prior_tokenizer

    @property
    def text_encoder(self) -> Any:
        """The text encoder of the CLIP."""
        return self.prior_text_encoder

    @property
    def image_encoder(self) -> Any:
        """The image encoder of the CLIP."""
        return self.prior_image_encoder

    @property
    def image_size(self) -> int:
        """The size of the images, height and width in pixels."""
        return int(self.unet.config.sample_size * 2 ** (len(self.movq.config.block_out_channels) - 1))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        image_embeds: torch.Tensor | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        num_candidates: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Return ``.images``, one for each prompt or embedding; ``(images,)`` if not `return_dict`.

        num_inference_steps, guidance_scale: of the decoder; those of the prior have their names. negative_prompt: for
        the prior; the decoder is guided by the embedding of a zero image. image_embeds: embeddings (B, D) that take the
        place of the prior's, as `embed_prompt` and `embed_image` return them.
        num_candidates: embeddings that the prior samples for each prompt, of which it keeps the one most like the text.
        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent": the latents.
        generator: with a list, image i depends on generator i only. callback_on_step_end: gets ``latents`` of the
        decoder. None: as in the config. ValueError for unusable inputs.
        """
        self._interrupt = False
        steps, scale = said(self, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        stage_call("", self.scheduler, self.unet, steps, scale, latents=True)
        check_output(output_type, return_dict)
        after_step = callback_steps(self, callback_on_step_end)
        if image_embeds is None:
            settings = prior_num_inference_steps, prior_guidance_scale
            image_embeds = self._prior_embeds((prompt, negative_prompt), settings, num_candidates, generator)
        null = zero_image_embeds(self.image_encoder, self._execution_device)
        embeds = given_embeds(self, None, image_embeds, null)
        how = Sampling(steps, scale, self.progress_bar, after_step)
        x0 = latents_or_images(self, embeds, null, how, generator, output_type)
        return image_output(self, x0, output_type, return_dict)

    @torch.no_grad()
    def embed_prompt(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_candidates: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Return the image embeddings (B, D), float32, that the prior predicts for prompts; as `PriorPipeline`."""
        settings = num_inference_steps, guidance_scale
        embeds = self._prior_embeds((prompt, negative_prompt), settings, num_candidates, generator)
        self.maybe_free_model_hooks()
        return embeds

    @torch.no_grad()
    def embed_image(self, image: Any) -> torch.Tensor:
        """Return the embeddings (B, D), float32, of images, as `given_images` takes them."""
        embeds = image_embeds(as_tensor("image", image), self.image_encoder, self._execution_device)
        self.maybe_free_model_hooks()
        return embeds

    @torch.no_grad()
    def interpolate(
        self,
        images_and_prompts: Sequence[Any],
        weights: Sequence[float],
        num_images: int = 1,
        negative_prompt: str = "",
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        num_candidates: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **call: Any,
    ) -> Any:
        """Return ``.images``, `num_images` of the weighted sum of the embeddings of images and prompts.

        A prompt's embedding is the prior's; the first of several generators makes it. weights: one for each; a sum of 1
        keeps the length of what is mixed. The other arguments are those of a call of the pipeline.
        """
        whole_number("num_images", num_images, 1, MAX_IMAGES)
        if len(images_and_prompts) != len(weights) or not len(weights):
            raise ValueError(f"weights: got {len(weights)} for {len(images_and_prompts)} images and prompts")
        first = generator[0] if isinstance(generator, list | tuple) else generator
        settings, embeds = (prior_num_inference_steps, prior_guidance_scale), []
        for number, (one, weight) in enumerate(zip(images_and_prompts, weights, strict=True)):
            if isinstance(one, str):
                found = self._prior_embeds((one, negative_prompt), settings, num_candidates, first)
            else:
                found = image_embeds(as_tensor("image", one), self.image_encoder, self._execution_device)
            if len(found) != 1:
                raise ValueError(f"images_and_prompts[{number}]: got {len(found)} images; expected one")
            embeds.append(weight * found)
        mixed = torch.cat(embeds).sum(0, keepdim=True).expand(num_images, -1)
        return self(image_embeds=mixed, generator=generator, **call)

    def _prior_embeds(
        self, prompts: tuple[Any, Any], settings: tuple[int | None, float | None], count: int, generator: Any
    ) -> torch.Tensor:
        networks = self.prior_prior, self.prior_scheduler
        return prompt_image_embeds(self, "prior_", networks, prompts, settings, count, generator)
