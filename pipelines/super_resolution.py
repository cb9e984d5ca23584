"""The super-resolution of Imagen: larger images of small ones and prompts, in the layout of DeepFloyd IF."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cascade import Sampling, prompted_larger_images
from .inputs import check_output
from .sampling import StepCallback
from .source import Portable, single_file
from .stages import (
    callback_steps,
    check_prompted,
    checked_level,
    given_smaller,
    image_output,
    prompt_states,
    said,
    stage_call,
)


class SuperResolutionPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """The pipeline of a super-resolution stage: larger images, like `IFSuperResolutionPipeline`'s.

    It has the components of that class, and that class can load a saved folder; the card says when it makes the same
    images. unet: takes the noisy image and the small one, enlarged and noised, as six channels, and the level of that
    noise as ``class_labels``. image_noising_scheduler: adds that noise. small_size, noise_timesteps: pixels of the
    small images, and the number of levels, that it was trained on; None: any. num_inference_steps, guidance_scale: of a
    call that says none.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "watermarker"]
    _stock: ClassVar[str | None] = "IFSuperResolutionPipeline"
    _own_settings: ClassVar[tuple[str, ...]] = (
        "small_size",
        "noise_timesteps",
        "num_inference_steps",
        "guidance_scale",
    )
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        image_noising_scheduler: DDPMScheduler,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        watermarker: Any = None,
        requires_safety_checker: bool = False,
        small_size: int | None = None,
        noise_timesteps: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_prompted("unet", unet, text_encoder, 6)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=scheduler,
            image_noising_scheduler=image_noising_scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            watermarker=watermarker,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            small_size=small_size,
            noise_timesteps=noise_timesteps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        noise_level: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Return ``.images``, one for each of the small images; ``(images,)`` if not `return_dict`.

        image: PIL images, arrays or tensors (`given_images`) of `small_size` pixels; others are resized to it. One
        prompt goes with all of them.
        noise_level: timestep, from 0 on, of the noise that is added to them; the more, the less of them is kept. None:
        `NOISE_LEVEL`, or the highest that it was trained on.
        guidance_scale: up to 1 there is no guidance. It and the steps are by default those of the config.
        negative_prompt: one, or one for each prompt.
        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent": "pt" in [-1, 1], not clipped.
        generator: with a list, image i depends on generator i only.
        callback_on_step_end: gets ``latents``, the noisy images. ValueError for unusable inputs.
        """
        self._interrupt = False
        steps, scale = said(self, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        stage_call("", self.scheduler, self.unet, steps, scale)
        level = checked_level(self, noise_level)
        check_output(output_type, return_dict)
        small, texts = given_smaller(self, image, self.config.small_size, prompt, negative_prompt)
        after_step = callback_steps(self, callback_on_step_end)
        how = Sampling(steps, scale, self.progress_bar, after_step)
        noised = self.image_noising_scheduler, level
        x0 = prompted_larger_images(self.unet, self.scheduler, small, noised, texts, how, generator)
        return image_output(self, x0, output_type, return_dict)

    @torch.no_grad()
    def encode_prompt(self, prompt: str, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states, (1, L, D), of a prompt and of no prompt."""
        return prompt_states("prompt", [prompt], self), prompt_states("prompt", [""], self)
