"""Text to image by a cascade of pixels that reads with a language model (Saharia et al. 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cascade import Sampling, prompted_images, prompted_larger_images
from .inputs import check_output
from .sampling import StepCallback
from .source import Portable, single_file
from .stages import (
    both_states,
    callback_steps,
    check_prompted,
    checked_level,
    given_smaller,
    image_output,
    prompt_states,
    said,
    stage_call,
)


class ImagenPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """Images of prompts by the two stages of Imagen: a small image of the prompt, and a larger one of both.

    text_encoder: the language model that both stages were trained with. super_res: takes the small image, enlarged and
    noised by `image_noising_scheduler`, as three more channels, and the level of the noise as ``class_labels``.
    noise_timesteps: the number of levels that it was trained on; None: any. The other values of the config are the
    settings of a call that does not say otherwise: those that the stages were validated with.
    """

    model_cpu_offload_seq = "text_encoder->unet->super_res"
    _stock: ClassVar[str | None] = None
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        unet: UNet2DConditionModel,
        super_res: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        super_res_scheduler: SchedulerMixin,
        image_noising_scheduler: DDPMScheduler,
        noise_timesteps: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        super_res_num_inference_steps: int = 25,
        super_res_guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_prompted("unet", unet, text_encoder, 3)
        check_prompted("super_res", super_res, text_encoder, 6)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            super_res=super_res,
            scheduler=scheduler,
            super_res_scheduler=super_res_scheduler,
            image_noising_scheduler=image_noising_scheduler,
        )
        self.register_to_config(
            noise_timesteps=noise_timesteps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            super_res_num_inference_steps=super_res_num_inference_steps,
            super_res_guidance_scale=super_res_guidance_scale,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def image_size(self) -> int:
        """The size of the images, height and width in pixels."""
        return int(self.super_res.config.sample_size)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        super_res_num_inference_steps: int | None = None,
        super_res_guidance_scale: float | None = None,
        noise_level: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Return ``.images``, one for each prompt; ``(images,)`` if not `return_dict`.

        num_inference_steps, guidance_scale: of the small image; up to 1 there is no guidance. The super-resolution's
        have their names; None: as in the config. negative_prompt: for both, one, or one for each prompt.
        noise_level: timestep, from 0 on, of the noise that is added to the small image, against its faults; the more,
        the less of it is kept. None: as in `SuperResolutionPipeline`.
        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent": "pt" in [-1, 1], not clipped.
        generator: with a list, image i depends on generator i only.
        callback_on_step_end: gets ``latents``, the noisy images of both stages. ValueError for unusable inputs.
        """
        self._interrupt = False
        steps, scale = said(self, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        stage_call("", self.scheduler, self.unet, steps, scale)
        larger = self._super_res_sampling(super_res_num_inference_steps, super_res_guidance_scale)
        noised = self.image_noising_scheduler, checked_level(self, noise_level)
        check_output(output_type, return_dict)
        texts = both_states(self, prompt, negative_prompt)
        after_step = callback_steps(self, callback_on_step_end)
        first = Sampling(steps, scale, self.progress_bar, after_step)
        small = prompted_images(self.unet, self.scheduler, *texts, first, generator)
        then = Sampling(*larger, self.progress_bar, after_step)
        x0 = prompted_larger_images(self.super_res, self.super_res_scheduler, small, noised, texts, then, generator)
        return image_output(self, x0, output_type, return_dict)

    @torch.no_grad()
    def upsample(
        self,
        prompt: str | Sequence[str],
        image: Any,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        noise_level: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Return ``.images``, larger ones of small images and prompts; as `SuperResolutionPipeline`."""
        self._interrupt = False
        steps, scale = self._super_res_sampling(num_inference_steps, guidance_scale)
        noised = self.image_noising_scheduler, checked_level(self, noise_level)
        check_output(output_type, True)
        small, texts = given_smaller(self, image, self.unet.config.sample_size, prompt, negative_prompt)
        how = Sampling(steps, scale, self.progress_bar, callback_steps(self, None))
        x0 = prompted_larger_images(self.super_res, self.super_res_scheduler, small, noised, texts, how, generator)
        return image_output(self, x0, output_type, True)

    @torch.no_grad()
    def encode_prompt(self, prompt: str, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states, (1, L, D), of a prompt and of no prompt."""
        return prompt_states("prompt", [prompt], self), prompt_states("prompt", [""], self)

    def _super_res_sampling(self, steps: int | None, scale: float | None) -> tuple[int, float]:
        """Return the checked steps and guidance scale of the super-resolution."""
        steps, scale = said(self, super_res_num_inference_steps=steps, super_res_guidance_scale=scale)
        stage_call("super_res_", self.super_res_scheduler, self.super_res, steps, scale)
        return steps, scale
