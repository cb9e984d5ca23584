"""Text to image, in the layout of Stable Diffusion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from .inputs import Inputs, Limits, check_inputs, texts
from .prompts import encode
from .sampling import StepCallback, both, denoise, guided_output
from .schedulers import check_scheduler, set_timesteps
from .source import Portable, single_file


class TextToImagePipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
    TextualInversionLoaderMixin,  # type: ignore[misc]
    StableDiffusionLoraLoaderMixin,  # type: ignore[misc]
):
    """Pictures from prompts, as `StableDiffusionPipeline` makes them, with every input checked.

    The components are that class's, and a saved folder is read by both: ``from_pretrained(folder)`` of
    `DiffusionPipeline` gives the stock pipeline, ``from_pretrained(folder, custom_pipeline=folder,
    trust_remote_code=True)`` this one, from its source in the folder. Same components, same noise: same pictures.

    Beyond the stock pipeline: denoisers with a learned variance (twice the latent channels), ValueError for
    schedulers that would run but sample wrongly (`check_scheduler`), FloatingPointError for black pictures.

    text_encoder: its first output, (B, L, D), is the embeddings; if its config has `use_attention_mask`, as BERT-like
    ones need, it is given the mask. safety_checker: None. Components that a call does not need may be None.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "image_encoder"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]
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
        if scheduler is not None:
            # As the stock class does, so that both sample a folder alike.
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

    @property
    def guidance_scale(self) -> float:
        """Of the current call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the denoiser sees the negative prompt too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Scheduler steps of the current call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether to stop after this step; a callback may set `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Return ``.images``, `num_images_per_prompt` for each prompt in turn; ``(images,)`` if not `return_dict`.

        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent" (B, C, h, w), float32.
        guidance_scale: >= 0; up to 1 there is no guidance, and one denoiser pass a step. generator: a list makes
        picture i from generator i, whatever the batch. latents: unit noise. The others are as in diffusers.
        ValueError for unusable inputs, FloatingPointError if the denoiser or decoder gives NaN or infinity.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_scheduler(self.scheduler, self.unet.config.in_channels, self.unet.config.out_channels)
        inputs = check_inputs(
            self._limits(),
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        latents = self._denoise(inputs, callback_on_step_end)
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return prompt and negative prompt embeddings, each (B * num_images_per_prompt, L, D), copies together.

        The negative ones are those of "" if none are given, and None without guidance. Embeddings that are given
        are only moved and repeated. Prompts that are too long are cut, with one warning.
        """
        device = device or self._execution_device
        dtype = (self.unet or self.text_encoder).dtype

        def ready(embeds: torch.Tensor) -> torch.Tensor:
            return embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)

        if prompt_embeds is None:
            prompt_embeds = self._encode("prompt", texts("prompt", prompt), None, device)
        if not do_classifier_free_guidance:
            return ready(prompt_embeds), None
        if negative_prompt_embeds is None:
            negatives = texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
            negative_prompt_embeds = self._encode("negative_prompt", negatives, prompt_embeds.shape[1], device)
            negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1, -1)
        return ready(prompt_embeds), ready(negative_prompt_embeds)

    def _encode(self, name: str, prompts: list[str], length: int | None, device: torch.device) -> torch.Tensor:
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(f"{name}: the pipeline has no text encoder or no tokenizer; give {name}_embeds instead")
        added = self.tokenizer.added_tokens_encoder
        if any(f"{token}_1" in added for token in added):  # textual inversion: one word, several tokens
            prompts = self.maybe_convert_prompt(prompts, self.tokenizer)
        return encode(
            name, prompts, self.tokenizer, self.text_encoder, length or self.tokenizer.model_max_length, device
        )

    def _limits(self) -> Limits:
        unet, size = self.unet.config, self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        width = unet.encoder_hid_dim or unet.cross_attention_dim
        # PNDM starts with four Runge-Kutta steps, unless told not to.
        fewest = 4 if self.scheduler.config.get("skip_prk_steps") is False else 1
        return Limits(
            factor=self.vae_scale_factor,
            default_size=(rows * self.vae_scale_factor, columns * self.vae_scale_factor),
            latent_channels=unet.in_channels,
            inference_steps=(fewest, self.scheduler.config.num_train_timesteps),
            prompt_length=None if self.tokenizer is None else self.tokenizer.model_max_length,
            embed_width=width if isinstance(width, int) else None,
            callback_tensors=tuple(self._callback_tensor_inputs),
        )

    def _denoise(self, inputs: Inputs, callback: StepCallback | None) -> torch.Tensor:
        """Return the latents after the last step, float32."""
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            inputs.prompt,
            None,
            inputs.num_images_per_prompt,
            self.do_classifier_free_guidance,
            inputs.negative_prompt,
            inputs.prompt_embeds,
            inputs.negative_prompt_embeds,
        )
        if negative_prompt_embeds is not None:
            prompt_embeds = both(negative_prompt_embeds, prompt_embeds)
        device, noise = self._execution_device, inputs.latents
        timesteps = set_timesteps(self.scheduler, inputs.num_inference_steps, device)
        self._num_timesteps = len(timesteps)
        if noise is None:
            noise = randn_tensor(inputs.latents_shape, inputs.generator, device, torch.float32)
        embeds = [prompt_embeds]  # a callback may replace them

        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            text = {"encoder_hidden_states": embeds[0]}
            return guided_output(self.unet, self.scheduler, latents, timestep, self.guidance_scale, kwargs=text)

        def after_step(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
            if callback is not None:
                tensors: dict[str, Any] = {
                    "latents": latents,
                    "prompt_embeds": embeds[0],
                    "negative_prompt_embeds": negative_prompt_embeds,
                }
                shown = {name: tensors[name] for name in inputs.callback_on_step_end_tensor_inputs}
                tensors |= callback(self, step, timestep, shown) or {}
                latents, embeds[0] = tensors["latents"], tensors["prompt_embeds"]
            return latents, self.interrupt

        return denoise(
            predict, self.scheduler, noise.to(device), timesteps, inputs.generator, after_step, self.progress_bar
        )

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixel_values = self.vae.decode(latents, return_dict=False)[0]
        if not pixel_values.isfinite().all():
            raise FloatingPointError(
                f"non-finite pixels from the autoencoder, in {self.vae.dtype}; try pipe.vae.to(torch.float32)"
            )
        return self.image_processor.postprocess(pixel_values, output_type=output_type)
