"""The upsampler: from a small image to a larger one, without a text (Ramesh et al. 2022, section 2.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor

from .cascade import Sampling, upsampled_images
from .inputs import check_output
from .sampling import StepCallback
from .source import Portable, single_file
from .stages import callback_steps, check_upsampler, image_output, said, small_images, stage_call


class UpsamplerPipeline(
    Portable,
    DiffusionPipeline,  # type: ignore[misc]
):
    """The pipeline of an upsampler in pixel space: large images of small ones.

    unet: takes the noisy image and the small one, enlarged, as six channels. small_size: pixels, height and width, of
    the small images that it was trained on. num_inference_steps: those of a call that names none.
    """

    model_cpu_offload_seq = "unet"
    _stock: ClassVar[str | None] = None
    _source: ClassVar[str] = single_file(Path(__file__))

    def __init__(
        self, unet: UNet2DModel, scheduler: SchedulerMixin, small_size: int | None = None, num_inference_steps: int = 25
    ) -> None:
        super().__init__()
        check_upsampler("unet", unet, small_size)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(small_size=small_size, num_inference_steps=num_inference_steps)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Return ``.images``, one for each of the small images; ``(images,)`` if not `return_dict`.

        image: PIL images, arrays or tensors (`given_images`) of `small_size` pixels; others are resized to it.
        num_inference_steps: None: as in the config.
        output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; "latent": "pt" in [-1, 1], not clipped.
        generator: with a list, image i depends on generator i only. callback_on_step_end: gets ``latents``.
        ValueError for unusable inputs.
        """
        self._interrupt = False
        (steps,) = said(self, num_inference_steps=num_inference_steps)
        stage_call("", self.scheduler, self.unet, steps)
        check_output(output_type, return_dict)
        small = small_images(image, self.config.small_size).to(self._execution_device)
        how = Sampling(steps, progress=self.progress_bar, after_step=callback_steps(self, callback_on_step_end))
        x0 = upsampled_images(self.unet, self.scheduler, small, how, generator)
        return image_output(self, x0, output_type, return_dict)
