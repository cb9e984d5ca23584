"""The pipeline in pixel space, with or without classes, in the layout of DDPM."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .image import RGB, checked_strength, given_images, kept_size, start_image
from .inputs import (
    MAX_IMAGES,
    check_callback,
    check_generators,
    check_guidance,
    check_options,
    check_output,
    checked_size,
    whole_number,
)
from .sampling import StepCallback, both, denoise, guided_output
from .schedulers import check_eta, check_scheduler, set_timesteps
from .source import Portable, single_file


class PixelPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """The pipeline in pixel space: images like `DDPMPipeline`'s; with classes and guidance if the denoiser has classes.

    It has the components of that class, and that class can load a saved folder. Without classes, both give the same
    images of the same components and generator, with two exceptions. The stock class takes a learned variance only with
    `DDPMScheduler`. And where `DDIMScheduler` clips its estimate of the image, the stock class then takes other
    noise. It passes no classes to the denoiser.

    unet: with ``num_class_embeds: N + 1`` it has N classes; the last number is the null class of guidance.
    """

    model_cpu_offload_seq = "unet"
    _stock: ClassVar[str] = "DDPMPipeline"
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if scheduler is not None and unet is not None:
            check_scheduler(scheduler, unet.config.in_channels, unet.config.out_channels, may_clip=True)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def num_classes(self) -> int:
        """The number of classes of the denoiser, without the null class; 0: it is not conditioned on classes."""
        embeds = self.unet.config.num_class_embeds
        return 0 if embeds is None else int(embeds) - 1

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | None] | int | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
    ) -> Any:
        """Return ``.images``, one for each of `class_labels`, else `batch_size`; ``(images,)`` if not `return_dict`.

        class_labels: whole numbers below `num_classes`; None: the null class, and the only choice without classes.
        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent": "pt" in [-1, 1], not clipped.
        guidance_scale: 0 or more; up to 1, or without classes, there is no guidance, and one denoiser pass each step.
        generator: with a list, image i depends on generator i only, not on the batch.
        callback_on_step_end: gets ``latents``, the noisy images, and may return others; it may set `_interrupt`.
        image: PIL images, arrays or tensors (`given_images`) to start from. Only the last `strength` of the steps are
        taken (0.8 of them; with a mask all), and the image changes only where `mask_image` is white (`start_image`). It
        keeps its size, rounded down to a multiple that the denoiser takes, unless height or width is given.
        timesteps, sigmas: in place of `num_inference_steps`. eta: share of noise that DDIM adds.
        ValueError for unusable inputs, FloatingPointError if the denoiser gives NaN or infinity.
        """
        self._interrupt = False
        unet = self.unet.config
        check_scheduler(self.scheduler, unet.in_channels, unet.out_channels, may_clip=True)
        check_output(output_type, return_dict)
        check_callback(callback_on_step_end)
        check_guidance(guidance_scale)
        check_options(guidance_rescale)
        check_eta(self.scheduler, eta)
        whole_number("num_inference_steps", num_inference_steps, 1, self.scheduler.config.num_train_timesteps)
        labels = self._labels(class_labels, batch_size)
        generators = check_generators(generator, len(labels))
        rows, columns = (unet.sample_size,) * 2 if isinstance(unet.sample_size, int) else unet.sample_size
        device, halved = self._execution_device, 2 ** (len(unet.block_out_channels) - 1)
        images, learned = None, (rows, columns)
        if image is not None:
            images = given_images("image", image, RGB, "white")
        default = kept_size(images if height is None or width is None else None, 1, halved, learned)
        size = checked_size(height, width, default, halved, "{}, by which the denoiser divides it")
        shape = (len(labels), unet.in_channels, *size)

        def encoded(pixel_values: torch.Tensor, generator: Any) -> torch.Tensor:
            return pixel_values.to(device)

        share = checked_strength(strength, image, mask_image)
        start = start_image(self.image_processor, encoded, images, mask_image, share, size, shape, generators)
        times = set_timesteps(self.scheduler, num_inference_steps, device, share, timesteps, sigmas)
        noise = randn_tensor(shape, generators, device, torch.float32)
        kwargs, scale = self._conditions(labels, guidance_scale, device)

        def predict(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return guided_output(self.unet, self.scheduler, x_t, timestep, scale, (), kwargs, guidance_rescale)

        def after_step(step: int, timestep: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, bool]:
            if callback_on_step_end is not None:
                x_t = (callback_on_step_end(self, step, timestep, {"latents": x_t}) or {}).get("latents", x_t)
            return x_t, self._interrupt

        bar = self.progress_bar
        x0 = denoise(predict, self.scheduler, noise, times, generators, after_step, bar, start, eta)
        self.maybe_free_model_hooks()
        sampled = x0 if output_type == "latent" else self.image_processor.postprocess(x0, output_type=output_type)
        return ImagePipelineOutput(images=sampled) if return_dict else (sampled,)

    def _conditions(
        self, labels: list[int], guidance_scale: float, device: torch.device
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Return the conditioning of the denoiser, as keyword arguments, and the guidance scale: 1 without classes."""
        if not self.num_classes:
            return {}, 1.0
        given = torch.tensor(labels, device=device)
        null = torch.full_like(given, self.num_classes)
        return {"class_labels": both(null, given) if guidance_scale > 1 else given}, guidance_scale

    def _labels(self, class_labels: Sequence[int | None] | int | None, batch_size: int) -> list[int]:
        """Return the class label of each image; `num_classes` is the null class."""
        whole_number("batch_size", batch_size, 1, MAX_IMAGES)
        several = isinstance(class_labels, list | tuple)
        wanted: Sequence[Any] = class_labels if several else [class_labels] * batch_size  # type: ignore[assignment]
        if not 1 <= len(wanted) <= MAX_IMAGES:
            raise ValueError(f"class_labels: got {len(wanted)}; expected 1 to {MAX_IMAGES}")
        for label in wanted:
            if label is not None and not self.num_classes:
                raise ValueError("class_labels: the denoiser knows no classes; leave them out")
            if label is not None:
                whole_number("class_labels", label, 0, self.num_classes - 1)
        return [self.num_classes if label is None else int(label) for label in wanted]
