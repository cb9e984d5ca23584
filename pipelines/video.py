"""Text to video: short clips from a caption, by temporal layers in a latent image model (Blattmann et al. 2023)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .given_frames import InContext, KnownFrames, check_context_guidance, given_clips, passes, spread
from .image import RGB, GivenImages, given_images
from .inputs import MAX_IMAGES, CallInputs, check_inputs, check_options, whole_number
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

    unet: a `VideoUNet`; vae: an AutoencoderKL, or a `VideoAutoencoder`, which decodes clips as such. The source of both
    is saved beside their weights. num_frames, num_inference_steps, guidance_scale: of a call that says none.
    max_context: largest number of first frames that it learned to go on from; interpolates: True if it learned to fill
    in between a first and a last frame.
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
        max_context: int = 0,
        interpolates: bool = False,
    ) -> None:
        super().__init__()
        check_scheduler(scheduler, unet.config.in_channels, unet.config.out_channels)
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_context=max_context,
            interpolates=interpolates,
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
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        context_guidance_scale: float = 1.0,
    ) -> Any:
        """Return ``.frames``, `num_videos_per_prompt` clips for each prompt in turn; else ``(frames,)``.

        num_frames: 1 or more; 1 gives images, by the image network alone. It, the steps and guidance_scale are by
        default those of the config. output_type: "pil", a list of PIL images for each clip; "np" (B, F, H, W, 3) or
        "pt" (B, F, 3, H, W) in [0, 1]; "latent" (B, C, F, h, w), float32. generator: with a list, clip i depends on
        generator i only. latents: unit noise (B, C, F, h, w).
        image: the first frame, one for all clips or one a prompt, as `given_images` takes them; last_image: the last
        one too. video: the first frames, as `given_clips` takes them. They are made as large as the clip, are part of
        it, and come back through the autoencoder.
        With given frames, or more than the config's num_frames, a model that learned to go on from frames makes the
        clip in several passes, each from the last frames of the one before; the steps that a callback sees begin anew
        in each, and a clip that is interrupted ends there. context_guidance_scale: as in `InContext`.
        The others are as in `Prompted`.
        ValueError for unusable inputs, FloatingPointError if the denoiser or decoder gives NaN or infinity.
        """
        check_scheduler(self.scheduler, self.denoiser.config.in_channels, self.denoiser.config.out_channels)
        check_eta(self.scheduler, eta)
        check_options(guidance_rescale)
        check_context_guidance(context_guidance_scale)
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
        known = self._known(inputs, image, last_image, video)
        sampled = self._sample(inputs, known, steps, callback_on_step_end, eta, float(context_guidance_scale))
        frames = sampled if output_type == "latent" else self._decode(sampled, output_type)
        self.maybe_free_model_hooks()
        return VideoOutput(frames) if return_dict else (frames,)

    def _known(self, inputs: CallInputs, image: Any, last_image: Any, video: Any) -> KnownFrames:
        """Return the frames that a call gives, encoded; ValueError if the model cannot go on from them."""
        samples, num_frames, most = inputs.latents_shape[0], inputs.latents_shape[2], self.config.max_context
        given = torch.zeros(num_frames, dtype=torch.bool)
        latents = torch.zeros(inputs.latents_shape, device=self._device)
        if image is not None and video is not None:
            raise ValueError("image, video: got both; expected one of them, the first frame or the first frames")
        if last_image is not None and (image is None or not self.config.interpolates):
            raise ValueError("last_image: expected image too, and a model trained with conditioners.frames.between")
        if last_image is not None and not 3 <= num_frames <= self.config.num_frames:
            raise ValueError(f"num_frames: got {num_frames}; expected 3 to {self.config.num_frames} with last_image")
        if (image is not None or video is not None) and last_image is None and not most:
            raise ValueError("image, video: this model goes on from no frames: see conditioners.frames.max_context")
        places = {"image": 0, "last_image": num_frames - 1}
        for name, one in (("image", image), ("last_image", last_image)):
            if one is not None:
                images = given_images(name, one, RGB, "white")
                still = [self._encoded(images[number : number + 1], inputs) for number in range(len(images))]
                latents[:, :, places[name]] = spread(name, still, samples, inputs.num_images_per_prompt)[:, :, 0]
                given[places[name]] = True
        if video is not None:
            clips = [self._encoded(clip, inputs) for clip in given_clips("video", video)]
            first = clips[0].shape[1]
            if first >= num_frames:
                raise ValueError(f"num_frames: got {num_frames}; expected more than the {first} frames of the video")
            latents[:, :, :first] = spread("video", clips, samples, inputs.num_images_per_prompt)
            given[:first] = True
        if given.all():
            raise ValueError(f"num_frames: got {num_frames}, and all of them are given; expected more")
        return KnownFrames(latents, given.to(latents.device))

    def _encoded(self, frames: GivenImages, inputs: CallInputs) -> torch.Tensor:
        """Return the latents, (C, F, h, w), of frames that are made as large as the clip."""
        rows, columns = (size * self.vae_scale_factor for size in inputs.latents_shape[3:])
        pixel_values = self.image_processor.preprocess(frames, rows, columns).to(self._device, self.vae.dtype)
        parts = [self.vae.encode(part).latent_dist.mode() for part in torch.split(pixel_values, CHUNK)]
        latents: torch.Tensor = self.vae.config.scaling_factor * torch.cat(parts).float()
        return latents.transpose(0, 1)

    def _sample(
        self,
        inputs: CallInputs,
        known: KnownFrames,
        steps: int,
        callback: StepCallback | None,
        eta: float,
        context_guidance_scale: float,
    ) -> torch.Tensor:
        """Return latents of the whole clips, (B, C, F, h, w), made in one pass or several."""
        num_frames, most = inputs.latents_shape[2], self.config.max_context
        several = [*passes(num_frames, known.first, self.config.num_frames, most)]
        if inputs.latents is not None and several != [(0, num_frames)]:
            raise ValueError(f"latents: got noise for a clip of {len(several)} passes; expected None, or a generator")
        scale = self._guidance_scale
        for start, stop in several:
            self._guidance_scale = scale  # a callback may have changed it in the pass before
            shape = (*inputs.latents_shape[:2], stop - start, *inputs.latents_shape[3:])
            denoiser = None
            if most or self.config.interpolates:
                denoiser = InContext(self.denoiser, known.context(start, stop), context_guidance_scale)
            times = set_timesteps(self.scheduler, steps, self._device)
            self._num_timesteps = len(times)
            made = self._denoise(replace(inputs, latents_shape=shape), times, None, callback, eta, denoiser)
            known = known.with_frames(start, made)
            if self.interrupt:
                return known.latents[:, :, : known.first]
        return known.latents

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Return clips of latents (B, C, F, h, w) in the form of `output_type`.

        They are decoded frame by frame, unless the decoder has temporal layers.
        """
        if hasattr(self.vae, "temporal"):
            whole = [
                torch.cat([self._pixels(part) for part in torch.split(clip, CHUNK, 2)], 2)
                for clip in torch.split(latents, 1)
            ]
            return self.image_processor.postprocess_video(torch.cat(whole), output_type)
        parts = torch.split(latents.transpose(1, 2).flatten(0, 1), CHUNK)
        frames = torch.cat([self._pixels(part) for part in parts])
        clips = frames.view(len(latents), latents.shape[2], *frames.shape[1:]).transpose(1, 2)
        return self.image_processor.postprocess_video(clips, output_type)
