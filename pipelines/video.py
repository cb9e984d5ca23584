"""Text to video: short clips from a caption, by temporal layers in a latent image model (Blattmann et al. 2023)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .inputs import MAX_IMAGES, check_inputs, check_options, whole_number
from .prompted import Prompted
from .sampling import StepCallback
from .schedulers import check_eta, check_scheduler, set_timesteps
from .source import Portable, single_file
from .stages import said

CHUNK = 64
"""Frames that are decoded at once."""


class VideoOutput(NamedTuple):
    """The output of a video pipeline."""

    frames: Any
    """Clips: lists of PIL images; (B, F, H, W, 3) or (B, F, 3, H, W) in [0, 1]; or latents (B, C, F, h, w)."""


class VideoPipeline(
    Portable,
    Prompted,
    DiffusionPipeline,  # type: ignore[misc]
):
    """The pipeline of a latent image model with temporal layers: clips of prompts, or with one frame images.

    unet: a `VideoUNet`, whose source is saved beside its weights. num_frames, num_inference_steps, guidance_scale: of a
    call that says none.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _denoiser: ClassVar[str] = "unet"
    _stock: ClassVar[str | None] = None
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: Any,
        scheduler: SchedulerMixin,
        num_frames: int = 8,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
    ) -> None:
        super().__init__()
        check_scheduler(scheduler, unet.config.in_channels, unet.config.out_channels)
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_frames=num_frames, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """Return ``.frames``, `num_videos_per_prompt` clips for each prompt in turn; else ``(frames,)``.

        num_frames: 1 or more; 1 gives images, by the image network alone. It, the steps and guidance_scale are by
        default those of the config. output_type: "pil", a list of PIL images for each clip; "np" (B, F, H, W, 3) or
        "pt" (B, F, 3, H, W) in [0, 1]; "latent" (B, C, F, h, w), float32. generator: with a list, clip i depends on
        generator i only. latents: unit noise (B, C, F, h, w). The others are as in `Prompted`.
        ValueError for unusable inputs, FloatingPointError if the denoiser or decoder gives NaN or infinity.
        """
        check_scheduler(self.scheduler, self.denoiser.config.in_channels, self.denoiser.config.out_channels)
        check_eta(self.scheduler, eta)
        check_options(guidance_rescale)
        whole_number("num_videos_per_prompt", num_videos_per_prompt, 1, MAX_IMAGES)
        steps, scale = said(self, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        inputs = check_inputs(
            self._limits(None),
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=scale,
            num_images_per_prompt=num_videos_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=getattr(
                callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs
            ),
            num_frames=self.config.num_frames if num_frames is None else num_frames,
        )
        self._guidance_scale, self._guidance_rescale, self._interrupt = scale, guidance_rescale, False
        self._clip_skip, self._cross_attention_kwargs = None, None
        times = set_timesteps(self.scheduler, steps, self._device)
        self._num_timesteps = len(times)
        sampled = self._denoise(inputs, times, None, callback_on_step_end, eta)
        frames = sampled if output_type == "latent" else self._decode(sampled, output_type)
        self.maybe_free_model_hooks()
        return VideoOutput(frames) if return_dict else (frames,)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Return clips of latents (B, C, F, h, w), frame by frame, in the form of `output_type`."""
        parts = torch.split(latents.transpose(1, 2).flatten(0, 1), CHUNK)
        frames = torch.cat([self._pixels(part) for part in parts])
        clips = frames.view(len(latents), latents.shape[2], *frames.shape[1:]).transpose(1, 2)
        return self.image_processor.postprocess_video(clips, output_type)
