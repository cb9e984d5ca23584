"""The base stage of Imagen: images of prompts, in pixels, in the layout of DeepFloyd IF (Saharia et al. 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cascade import Sampling, prompted_images
from .inputs import check_output
from .sampling import StepCallback
from .source import Portable, single_file
from .stages import both_states, callback_steps, check_prompted, image_output, prompt_states, said, stage_call


class PromptedPixelPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """The pipeline of a denoiser of pixels that reads a language model: images like `IFPipeline`'s.

    It has the components of that class, and that class can load a saved folder; the card says when it makes the same
    images. text_encoder: its first output, (B, L, D), is read, padding included. num_inference_steps, guidance_scale:
    of a call that says none.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "watermarker"]
    _stock: ClassVar[str | None] = "IFPipeline"
    _own_settings: ClassVar[tuple[str, ...]] = ("num_inference_steps", "guidance_scale")
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        watermarker: Any = None,
        requires_safety_checker: bool = False,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
    ) -> None:
        super().__init__()
        check_prompted("unet", unet, text_encoder, 3)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            watermarker=watermarker,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Return ``.images``, one for each prompt; ``(images,)`` if not `return_dict`.

        guidance_scale: up to 1 there is no guidance. It and the steps are by default those of the config.
        negative_prompt: one, or one for each prompt.
        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent": "pt" in [-1, 1], not clipped.
        generator: with a list, image i depends on generator i only.
        callback_on_step_end: gets ``latents``, the noisy images. ValueError for unusable inputs.
        """
        self._interrupt = False
        steps, scale = said(self, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        stage_call("", self.scheduler, self.unet, steps, scale)
        check_output(output_type, return_dict)
        given, null = both_states(self, prompt, negative_prompt)
        after_step = callback_steps(self, callback_on_step_end)
        how = Sampling(steps, scale, self.progress_bar, after_step)
        x0 = prompted_images(self.unet, self.scheduler, given, null, how, generator)
        return image_output(self, x0, output_type, return_dict)

    @torch.no_grad()
    def encode_prompt(self, prompt: str, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states, (1, L, D), of a prompt and of no prompt."""
        return prompt_states("prompt", [prompt], self), prompt_states("prompt", [""], self)
