"""Text to image through the space of a CLIP: prior, decoder, upsampler (Ramesh et al. 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    PriorTransformer,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from .cascade import (
    Sampling,
    ddim,
    decoded_images,
    prompt_image_embeds,
    sampled_embeds,
    slerp,
    upsampled_images,
)
from .inputs import MAX_IMAGES, check_output, same_noise, texts, whole_number
from .sampling import StepCallback
from .schedulers import check_eta
from .source import Portable, single_file
from .stages import (
    as_tensor,
    both_texts,
    callback_steps,
    check_decoder,
    check_prior,
    check_upsampler,
    given_embeds,
    given_latents,
    image_output,
    null_image_embeds,
    said,
    small_images,
    stage_call,
    text_embeds,
    texts_of,
)

VARIED = 0.4
"""Share of DDPM's noise in variations. With it, those of 80 validation images of OpenMoji are nearest to their source
among all images in 0.875, with a share of 0.6 in 0.80."""


class UnCLIPPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """Images of prompts by the three stages of unCLIP, and the manipulations of images that they allow.

    The prior predicts the CLIP embedding of an image from a prompt; the decoder samples a small image of embedding and
    prompt; the upsampler makes it larger. image_encoder, text_encoder: the CLIP that all stages were trained with.
    null_image_embeds: as in `DecoderPipeline`. small_size: pixels of the decoder's images. The other values of the
    config are the settings of a call that does not say otherwise: those that the stages were validated with.
    """

    model_cpu_offload_seq = "text_encoder->prior->image_encoder->decoder->super_res"
    _stock: ClassVar[str | None] = None
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self,
        prior: PriorTransformer,
        decoder: UNet2DConditionModel,
        super_res: UNet2DModel,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        image_encoder: CLIPVisionModelWithProjection,
        prior_scheduler: SchedulerMixin,
        decoder_scheduler: SchedulerMixin,
        super_res_scheduler: SchedulerMixin,
        small_size: int | None = None,
        null_image_embeds: str = "zeros",
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 1.0,
        decoder_num_inference_steps: int = 25,
        decoder_guidance_scale: float = 1.0,
        super_res_num_inference_steps: int = 25,
    ) -> None:
        super().__init__()
        check_prior(prior, text_encoder, tokenizer)
        check_decoder("decoder", decoder, image_encoder, text_encoder)
        check_upsampler("super_res", super_res, small_size)
        if decoder is not None and decoder.config.sample_size != small_size:
            raise ValueError(
                f"decoder: samples images of {decoder.config.sample_size} pixels, and super_res was trained on those "
                f"of {small_size}"
            )
        self.register_modules(
            prior=prior,
            decoder=decoder,
            super_res=super_res,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            prior_scheduler=prior_scheduler,
            decoder_scheduler=decoder_scheduler,
            super_res_scheduler=super_res_scheduler,
        )
        self.register_to_config(
            small_size=small_size,
            null_image_embeds=null_image_embeds,
            prior_num_inference_steps=prior_num_inference_steps,
            prior_guidance_scale=prior_guidance_scale,
            decoder_num_inference_steps=decoder_num_inference_steps,
            decoder_guidance_scale=decoder_guidance_scale,
            super_res_num_inference_steps=super_res_num_inference_steps,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def image_size(self) -> int:
        """The size of the images, height and width in pixels."""
        return int(self.super_res.config.sample_size)

    @property
    def scheduler(self) -> Any:
        """The scheduler of the decoder, whose steps a call's `num_inference_steps` are."""
        return self.decoder_scheduler

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        image: Any = None,
        image_embeds: torch.Tensor | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        num_candidates: int = 1,
        super_res_num_inference_steps: int | None = None,
        decoder_latents: torch.Tensor | None = None,
        eta: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Return ``.images``, one for each prompt or embedding; ``(images,)`` if not `return_dict`.

        num_inference_steps, guidance_scale: of the decoder; those of the other stages have their names.
        negative_prompt: for prior and decoder. image: images whose embeddings take the place of the prior's; or
        image_embeds: embeddings (B, D). One prompt goes with all of them.
        num_candidates: embeddings that the prior samples for each prompt, of which it keeps the one most like the text.
        decoder_latents: unit noise (B, 3, H, W) that the decoder starts from, one for each image; from `invert`, say.
        eta: the decoder is sampled by DDIM, which adds this share of DDPM's noise; None: by its own scheduler.
        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent": "pt" in [-1, 1], not clipped.
        generator: with a list, image i depends on generator i only. callback_on_step_end: gets ``latents`` of the
        decoder and of the upsampler. None: as in the config. ValueError for unusable inputs.
        """
        check_output(output_type, return_dict)
        after_step = self._after_step(callback_on_step_end)
        steps, scale = said(
            self, decoder_num_inference_steps=num_inference_steps, decoder_guidance_scale=guidance_scale
        )
        scheduler = self._ddim(eta)
        stage_call("", scheduler, self.decoder, steps, scale)
        larger = self._super_res_sampling(super_res_num_inference_steps, after_step)
        given, null = both_texts(self, prompt, negative_prompt)
        nothing = null_image_embeds(self, self.decoder.config.cross_attention_dim)
        if image is None and image_embeds is None:
            how = self._prior_sampling(prior_num_inference_steps, prior_guidance_scale, num_candidates)
            image_embeds = sampled_embeds(self.prior, self.prior_scheduler, given, null, how, generator, num_candidates)
        embeds = given_embeds(self, image, image_embeds, nothing)
        given = texts_of(given, embeds)
        if decoder_latents is not None:
            shape = len(embeds), self.decoder.config.in_channels, *[self.config.small_size] * 2
            decoder_latents = given_latents(decoder_latents, shape, embeds.device)
        pair = embeds, given
        how = Sampling(steps, scale, self.progress_bar, after_step, decoder_latents, eta or 0.0)
        small = decoded_images(self.decoder, scheduler, pair, (nothing, null), how, generator)
        x0 = upsampled_images(self.super_res, self.super_res_scheduler, small, larger, generator)
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
        networks, settings = (self.prior, self.prior_scheduler), (num_inference_steps, guidance_scale)
        prompts = prompt, negative_prompt
        embeds = prompt_image_embeds(self, "prior_", networks, prompts, settings, num_candidates, generator)
        self.maybe_free_model_hooks()
        return embeds

    @torch.no_grad()
    def upsample(
        self,
        image: Any,
        num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Return ``.images``, larger ones of small images; as `UpsamplerPipeline`."""
        check_output(output_type, True)
        how = self._super_res_sampling(num_inference_steps, self._after_step(None))
        small = small_images(image, self.config.small_size).to(self._execution_device)
        x0 = upsampled_images(self.super_res, self.super_res_scheduler, small, how, generator)
        return image_output(self, x0, output_type, True)

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
    ) -> torch.Tensor:
        """Return the noise (B, 3, H, W) of which the decoder makes the small images of `image` again.

        It does so as `decoder_latents` of a call with the images' embeddings, ``eta=0`` and the same arguments as here
        (DDIM inversion, Dhariwal & Nichol 2021, appendix F); the more steps, the nearer.
        """
        steps, scale = said(
            self, decoder_num_inference_steps=num_inference_steps, decoder_guidance_scale=guidance_scale
        )
        stage_call("", self._ddim(0), self.decoder, steps, scale)
        given, null = both_texts(self, prompt, negative_prompt)
        nothing = null_image_embeds(self, self.decoder.config.cross_attention_dim)
        embeds = given_embeds(self, image, None, nothing)
        small = small_images(image, self.config.small_size).to(embeds)
        pair, how = (embeds, texts_of(given, embeds)), Sampling(steps, scale, self.progress_bar, latents=small)
        inverse = ddim(self.decoder_scheduler, inverse=True)
        latents = decoded_images(self.decoder, inverse, pair, (nothing, null), how, None)
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def variations(self, image: Any, num_images: int = 4, prompt: str = "", eta: float = VARIED, **call: Any) -> Any:
        """Return ``.images``, `num_images` of one image, from its embedding and its own noise (section 3.1).

        eta: 0 gives the image again, as far as the upsampler knows it; the more, the less they have in common beside
        the embedding. Nothing but the embedding: ``pipe(image=image)``.
        """
        whole_number("num_images", num_images, 1, MAX_IMAGES)
        embeds, latents = self._both_of("image", image, prompt, call)
        latents = latents.expand(num_images, -1, -1, -1)
        return self(prompt, image_embeds=embeds.expand(num_images, -1), decoder_latents=latents, eta=eta, **call)

    @torch.no_grad()
    def interpolate(self, first: Any, second: Any, num_images: int = 8, prompt: str = "", **call: Any) -> Any:
        """Return ``.images``, `num_images` from one image to another (section 3.2).

        Their embeddings lie on the great circle between those of the two images, their noise on that between theirs.
        """
        whole_number("num_images", num_images, 2, MAX_IMAGES)
        ends = [self._both_of(name, image, prompt, call) for name, image in (("first", first), ("second", second))]
        shares = torch.linspace(0, 1, num_images, device=self._execution_device)
        embeds, latents = (slerp(one.flatten(1), other.flatten(1), shares) for one, other in zip(*ends, strict=True))
        return self._from_noise(prompt, embeds, latents.view(-1, *ends[0][1].shape[1:]), call)

    @torch.no_grad()
    def text_difference(
        self, image: Any, source: str, target: str, num_images: int = 8, strength: float = 0.5, **call: Any
    ) -> Any:
        """Return ``.images``, `num_images` on the way from what `source` says of an image to what `target` says.

        The image's embedding is turned towards the difference of the two texts' embeddings, from none of the way up to
        the share `strength`; the noise stays that of the image (section 3.3, there 0.25 to 0.5).
        """
        whole_number("num_images", num_images, 2, MAX_IMAGES)
        if not 0 < strength <= 1:
            raise ValueError(f"strength: got {strength}; expected more than 0, at most 1")
        for name, text in (("source", source), ("target", target)):
            if not isinstance(text, str):
                raise ValueError(f"{name}: got {type(text).__name__}; expected a string")
        pooled = text_embeds("source", [*texts("source", source), *texts("target", target)], self).pooled.float()
        difference = pooled[1:] - pooled[:1]
        if not difference.any():
            raise ValueError("target: says the same as source; expected another text")
        start, latents = self._both_of("image", image, "", call)
        end = difference * (start.norm() / difference.norm())
        embeds = slerp(start, end, torch.linspace(0, strength, num_images, device=start.device))
        return self._from_noise("", embeds, latents.expand(num_images, -1, -1, -1), call)

    def _from_noise(self, prompt: str, embeds: torch.Tensor, latents: torch.Tensor, call: dict[str, Any]) -> Any:
        """Return the images of embeddings and noise, without more noise than the upsampler's, the same for all."""
        with same_noise(call.pop("generator", None), len(embeds)) as generators:
            return self(
                prompt, image_embeds=embeds, decoder_latents=latents, generator=generators, **{"eta": 0.0, **call}
            )

    def _both_of(self, name: str, image: Any, prompt: str, call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embedding (1, D) and the noise (1, 3, H, W) of one image, for a call with these arguments."""
        embeds = self._embeds_of(name, image)
        of_decoder = ("num_inference_steps", "guidance_scale", "negative_prompt")
        return embeds, self.invert(image, prompt, **{key: call[key] for key in of_decoder if key in call})

    def _embeds_of(self, name: str, image: Any) -> torch.Tensor:
        """Return the embedding of one image, (1, D)."""
        if len(as_tensor(name, image)) != 1:
            raise ValueError(f"{name}: got several images; expected one")
        null = torch.zeros(1, self.image_encoder.config.projection_dim, device=self._execution_device)
        return given_embeds(self, image, None, null)

    def _ddim(self, eta: float | None) -> Any:
        """Return the scheduler of a call with this `eta`."""
        if eta is None:
            return self.decoder_scheduler
        scheduler = ddim(self.decoder_scheduler)
        check_eta(scheduler, eta)
        return scheduler

    def _after_step(self, callback: StepCallback | None) -> Any:
        self._interrupt = False
        return callback_steps(self, callback)

    def _prior_sampling(self, steps: Any, scale: Any, num_candidates: int) -> Sampling:
        """Return the checked settings of the prior."""
        whole_number("num_candidates", num_candidates, 1, MAX_IMAGES)
        steps, scale = said(self, prior_num_inference_steps=steps, prior_guidance_scale=scale)
        stage_call("prior_", self.prior_scheduler, self.prior, steps, scale)
        return Sampling(steps, scale, self.progress_bar)

    def _super_res_sampling(self, num_inference_steps: int | None, after_step: Any) -> Sampling:
        (steps,) = said(self, super_res_num_inference_steps=num_inference_steps)
        stage_call("super_res_", self.super_res_scheduler, self.super_res, steps)
        return Sampling(steps, 1.0, self.progress_bar, after_step)
