"""The base of the text-to-image pipelines: images of prompts in a latent space, with any denoiser."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from .image import RGB, GivenImages, StartImage, checked_strength, given_images, is_latents, kept_size, start_image
from .inputs import MAX_IMAGES, CallInputs, Limits, check_inputs, check_options, same_noise, texts, whole_number
from .prompts import encode, lora_scaled
from .sampling import StepCallback, both, denoise, guided_output
from .schedulers import check_eta, check_scheduler, set_timesteps


class Prompted:
    """A base class for pipelines with a text encoder, a denoiser and an autoencoder.

    Components have their names in diffusers; the denoiser, which is `unet` or `transformer` there, is `denoiser` too.
    """

    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    image_processor: Any
    vae_scale_factor: int
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    _denoiser: ClassVar[str]
    """Name of the denoiser's component: unet or transformer."""
    _zero_padding: ClassVar[bool] = False
    """True if the denoiser gets a mask of padding tokens; in prompt embeddings, rows of zeros are padding."""

    @property
    def denoiser(self) -> Any:
        """The network that is conditioned on the prompts."""
        return getattr(self, self._denoiser)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """The guidance rescale of the current call; a callback may set `_guidance_rescale`."""
        return self._guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        """Layers of the text encoder that the current call leaves out."""
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """The attention arguments of the current call; a callback may set `_cross_attention_kwargs`."""
        return self._cross_attention_kwargs

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if the denoiser runs on the negative prompts too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps of the current call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True to stop after this step; a callback may set `_interrupt`."""
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
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return ``.images``, `num_images_per_prompt` for each prompt in turn; ``(images,)`` if not `return_dict`.

        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent" (B, C, h, w), float32.
        guidance_scale: 0 or more; up to 1 there is no guidance, and one denoiser pass in each step.
        generator: with a list, image i depends on generator i only, not on the batch. latents: unit noise.
        prompt_embeds: for a transformer, rows of zeros are padding.
        image: PIL images, arrays, tensors or latents (`given_images`) to start from. Only the last `strength` of the
        steps are taken (0.8 of them; with a mask all), and the image changes only where `mask_image` is white
        (`start_image`). It keeps its size, rounded down to whole latents, unless height or width is given.
        timesteps, sigmas: in place of `num_inference_steps`. eta: share of noise that DDIM adds.
        clip_skip: number of the text encoder's last layers to leave out, for prompts but not for negative ones.
        cross_attention_kwargs: its ``scale`` is that of the LoRA layers in denoiser and text encoder.
        The others are as in diffusers.
        ValueError for unusable inputs, FloatingPointError if the denoiser or decoder gives NaN or infinity.
        """
        check_scheduler(self.scheduler, self.denoiser.config.in_channels, self.denoiser.config.out_channels)
        check_eta(self.scheduler, eta)
        check_options(guidance_rescale, cross_attention_kwargs, clip_skip)
        images = None
        if image is not None:
            images = given_images("image", image, RGB, "white", self.denoiser.config.in_channels)
        inputs = check_inputs(
            self._limits(images if height is None or width is None else None),
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
            callback_on_step_end_tensor_inputs=getattr(
                callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs
            ),
        )
        self._guidance_scale, self._guidance_rescale, self._interrupt = guidance_scale, guidance_rescale, False
        self._clip_skip, self._cross_attention_kwargs = clip_skip, cross_attention_kwargs
        share = checked_strength(strength, image, mask_image)
        start = self._start(inputs, images, mask_image, share)
        times = set_timesteps(self.scheduler, num_inference_steps, self._device, share, timesteps, sigmas)
        self._num_timesteps = len(times)
        latents = self._denoise(inputs, times, start, callback_on_step_end, eta)
        sampled = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return ImagePipelineOutput(images=sampled) if return_dict else (sampled,)

    @torch.no_grad()
    def interpolate(self, first: str, second: str, num_images: int = 8, **call: Any) -> Any:
        """Return what a call does, `num_images` images (or clips), from one of the prompt `first` to one of `second`.

        The prompt embeddings are evenly spaced on the line between those of the two prompts; all images have the same
        noise. call: other arguments of a call, with one generator and `latents` of one image at most. For a
        transformer, tokens that only the longer prompt has count as padding only in the shorter prompt's image.
        ValueError for fewer than two images, and as in a call.
        """
        whole_number("num_images", num_images, 2, MAX_IMAGES)
        start, end = self.encode_prompt([*texts("first", first), *texts("second", second)], None, 1, False)[0]
        share = torch.linspace(0, 1, num_images, device=start.device, dtype=start.dtype)[:, None, None]
        prompt_embeds = torch.lerp(start.expand(num_images, -1, -1), end.expand(num_images, -1, -1), share)
        latents = call.get("latents")
        if torch.is_tensor(latents) and latents.ndim > 3 and len(latents) == 1:  # else the call raises the error
            call["latents"] = latents.expand(num_images, *latents.shape[1:])
        # one generator for each image, all of one state: scheduler noise and posterior samples are equal for all too
        with same_noise(call.pop("generator", None), num_images) as generators:
            return self(prompt_embeds=prompt_embeds, generator=generators, **call)

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return prompt and negative prompt embeddings, each (B * num_images_per_prompt, L, D), a prompt's in a row.

        The default negative prompt is ""; without guidance the negative embeddings are None. Given embeddings are only
        moved and repeated. Prompts that are too long are cut, with one warning. For a transformer, rows of zeros are
        padding. lora_scale: weight of the LoRA layers in the text encoder. clip_skip: number of its last layers to
        leave out, for prompts but not for negative ones (as in diffusers).
        """
        device = device or self._device
        dtype = (self.denoiser or self.text_encoder).dtype

        def ready(embeds: torch.Tensor) -> torch.Tensor:
            return embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)

        with lora_scaled(self.text_encoder, lora_scale):
            if prompt_embeds is None:
                prompt_embeds = self._encode("prompt", texts("prompt", prompt), None, device, clip_skip)
            if not do_classifier_free_guidance:
                return ready(prompt_embeds), None
            if negative_prompt_embeds is None:
                negatives = texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
                negative_prompt_embeds = self._encode("negative_prompt", negatives, prompt_embeds.shape[1], device)
                negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1, -1)
            return ready(prompt_embeds), ready(negative_prompt_embeds)

    def conditions(self, prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the conditioning of the denoiser, as keyword arguments."""
        kwargs = {"encoder_hidden_states": prompt_embeds}
        return kwargs | {"encoder_attention_mask": prompt_embeds.any(-1)} if self._zero_padding else kwargs

    def _encode(
        self, name: str, prompts: list[str], length: int | None, device: torch.device, clip_skip: int | None = None
    ) -> torch.Tensor:
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(f"{name}: the pipeline has no text encoder or no tokenizer; give {name}_embeds instead")
        added = self.tokenizer.added_tokens_encoder
        several = hasattr(self, "maybe_convert_prompt") and any(f"{token}_1" in added for token in added)
        if several:  # textual inversion: one word, several tokens
            prompts = self.maybe_convert_prompt(prompts, self.tokenizer)  # type: ignore[attr-defined]
        length = length or self.tokenizer.model_max_length
        zeroed = self._zero_padding
        return encode(name, prompts, self.tokenizer, self.text_encoder, length, device, zeroed, clip_skip)

    def _limits(self, images: GivenImages | None) -> Limits:
        """Return the limits of the components; images: those whose size is the default, if any."""
        denoiser, size = self.denoiser.config, self.denoiser.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        widths = (denoiser.get(name) for name in ("encoder_hid_dim", "caption_channels", "cross_attention_dim"))
        width = next((width for width in widths if width is not None), None)
        # PNDM starts with four Runge-Kutta steps unless its config skips them
        fewest = 4 if self.scheduler.config.get("skip_prk_steps") is False else 1
        factor, patch = self.vae_scale_factor, denoiser.get("patch_size") or 1
        learned = rows * factor, columns * factor
        return Limits(
            factor=factor,
            patch=patch,
            default_size=kept_size(images, factor, factor * patch, learned),
            latent_channels=denoiser.in_channels,
            inference_steps=(fewest, self.scheduler.config.num_train_timesteps),
            prompt_length=None if self.tokenizer is None else self.tokenizer.model_max_length,
            embed_width=width if isinstance(width, int) else None,
            callback_tensors=tuple(self._callback_tensor_inputs),
        )

    def _start(
        self, inputs: CallInputs, images: GivenImages | None, mask_image: Any, strength: float
    ) -> StartImage | None:
        """Return the encoded image to start from, None without images; the posterior is sampled before the noise."""
        if images is not None and not is_latents(images) and self.vae is None:
            raise ValueError("image: the pipeline has no autoencoder to encode it with; give latents")
        rows, columns = inputs.latents_shape[2:]

        def encoded(pixel_values: torch.Tensor, generator: Any) -> torch.Tensor:
            if is_latents(pixel_values):
                return pixel_values.to(self._device)
            found = self.vae.encode(pixel_values.to(self._device, self.vae.dtype))
            # AutoencoderTiny has no posterior
            latents = found.latent_dist.sample(generator) if hasattr(found, "latent_dist") else found.latents
            return cast(torch.Tensor, self.vae.config.scaling_factor * latents)

        size, shape = (rows * self.vae_scale_factor, columns * self.vae_scale_factor), inputs.latents_shape
        copies = inputs.num_images_per_prompt
        return start_image(
            self.image_processor, encoded, images, mask_image, strength, size, shape, inputs.generator, copies
        )

    def _denoise(
        self,
        inputs: CallInputs,
        timesteps: torch.Tensor,
        start: StartImage | None,
        callback: StepCallback | None,
        eta: float,
        denoiser: Any = None,
    ) -> torch.Tensor:
        """Return the latents after the last step, float32; `denoiser` takes the place of the component."""
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            inputs.prompt,
            None,
            inputs.num_images_per_prompt,
            self.do_classifier_free_guidance,
            inputs.negative_prompt,
            inputs.prompt_embeds,
            inputs.negative_prompt_embeds,
            (self.cross_attention_kwargs or {}).get("scale"),
            self.clip_skip,
        )
        if negative_prompt_embeds is not None:
            prompt_embeds = both(negative_prompt_embeds, prompt_embeds)
        noise, embeds = inputs.latents, [prompt_embeds]  # a callback may replace them
        if noise is None:
            noise = randn_tensor(inputs.latents_shape, inputs.generator, self._device, torch.float32)
        noise, called = noise.to(self._device), self.denoiser if denoiser is None else denoiser

        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            kwargs: dict[str, Any] = {**self.conditions(embeds[0])}
            if self.cross_attention_kwargs is not None:
                kwargs["cross_attention_kwargs"] = self.cross_attention_kwargs
            scale, rescale = self.guidance_scale, self.guidance_rescale
            return guided_output(called, self.scheduler, latents, timestep, scale, (), kwargs, rescale)

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

        bar = self.progress_bar  # type: ignore[attr-defined]
        return denoise(predict, self.scheduler, noise, timesteps, inputs.generator, after_step, bar, start, eta)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._execution_device  # type: ignore[attr-defined]
        return device

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        return self.image_processor.postprocess(self._pixels(latents), output_type=output_type)

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the images of latents, (B, C, h, w), in [-1, 1], not clipped."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        # a VQModel decodes latents as they are, as in training, and not their codes
        takes = inspect.signature(self.vae.decode).parameters
        options = {"force_not_quantize": True} if "force_not_quantize" in takes else {}
        pixel_values: torch.Tensor = self.vae.decode(latents, **options, return_dict=False)[0]
        if not pixel_values.isfinite().all():
            raise FloatingPointError(
                f"non-finite pixels from the autoencoder, in {self.vae.dtype}; try pipe.vae.to(torch.float32)"
            )
        return pixel_values
