"""Image-to-image and inpainting: an image to start from, and a mask of the parts to sample anew."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch.nn.functional import interpolate

from .inputs import MAX_LATENT, logger, shown

RGB = 3
MANY = 4
"""Largest number of pixels without a warning, as a multiple of those of the images that the model was trained on."""

GivenImages = list[Image.Image] | torch.Tensor
"""PIL images in RGB; or floats in [0, 1], (N, C, height, width); or latents, whose channels are not three."""


@dataclass(frozen=True)
class StartImage:
    """An encoded image that sampling starts from (SDEdit, Meng et al. 2022; with a mask, Lugmayr et al. 2022)."""

    x0: torch.Tensor
    """The encoded image for each sample, (B, C, h, w), float32."""
    mask: torch.Tensor | None
    """(B, 1, h, w): 1 where the image is sampled anew, 0 where x0 is kept. None: anew everywhere."""
    noised: bool
    """True: start from x0 with noise; False: from noise alone."""

    def start(self, scheduler: Any, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return x_t at the first of `timesteps`, (B, C, h, w); `noise` is unit noise of that shape."""
        if not self.noised:
            x_t: torch.Tensor = noise * scheduler.init_noise_sigma
            return x_t
        noised: torch.Tensor = scheduler.add_noise(self.x0, noise, timesteps[:1].repeat(len(noise)))
        return noised

    def keep(self, scheduler: Any, noise: torch.Tensor, timesteps: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """Return `x_t` where the mask is 1, and x0 where it is 0, noised to the first of the remaining `timesteps`."""
        if self.mask is None:
            return x_t
        known: torch.Tensor = self.x0
        if len(timesteps):
            known = scheduler.add_noise(known, noise, timesteps[:1])
        kept = (1 - self.mask) * known + self.mask * x_t
        return kept


def start_image(
    processor: VaeImageProcessor,
    encode: Callable[[torch.Tensor, Any], torch.Tensor],
    image: GivenImages | None,
    mask_image: Any,
    strength: float,
    size: tuple[int, int],
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    num_images_per_prompt: int = 1,
) -> StartImage | None:
    """Return `image` and `mask_image` in a model's space; None without an image.

    encode: takes images in [-1, 1], (N, 3, H, W), or latents, and a generator or a list of one for each image; returns
    x0, which may be a sample of the posterior.
    image: as `given_images` returns it. It is resized to `size`, height and width in pixels. There is one image, one
    for each prompt, or one for each sample of `shape`, the shape of the noise.
    mask_image: as `given_images` takes it. The image is sampled anew where it is white (0.5 or more); transparent parts
    are black.
    strength: as `checked_strength` returns it; with a mask, 1 starts from noise alone.
    ValueError if one of them is unusable.
    """
    if image is None:
        return None
    counts = 1, shape[0] // num_images_per_prompt, shape[0]
    _check_count("image", image, counts)
    pixel_values = image if is_latents(image) else processor.preprocess(image, *size)
    if is_latents(pixel_values) and pixel_values.shape[2:] != shape[2:]:
        came, asked = tuple(pixel_values.shape[2:]), tuple(shape[2:])
        raise ValueError(f"image: latents of {came}, but height and width are of {asked} latents; leave them out")
    if isinstance(generator, list):
        pixel_values = pixel_values.repeat_interleave(shape[0] // len(pixel_values), 0)
    mask = None
    if mask_image is not None:
        masks = given_images("mask_image", mask_image, 1, "black")
        _check_count("mask_image", masks, counts)
        grey = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True, vae_scale_factor=1)
        mask = interpolate(grey.preprocess(masks, *size).float(), size=shape[2:])
        mask = mask.repeat_interleave(shape[0] // len(mask), 0)
    x0 = encode(pixel_values, generator).float()
    x0 = x0.repeat_interleave(shape[0] // len(x0), 0)
    return StartImage(x0, None if mask is None else mask.to(x0), noised=mask is None or strength < 1)


def checked_strength(strength: float | None, image: Any, mask_image: Any) -> float:
    """Return the share of the steps that are taken, by default that of the stock pipelines.

    ValueError if it is not in (0, 1], or if `strength` or `mask_image` is given without an image.
    """
    if image is None and (mask_image is not None or strength is not None):
        name = "strength" if mask_image is None else "mask_image"
        raise ValueError(f"{name}: given without an image; give image too, or leave it out")
    if strength is None:
        return 0.8 if image is not None and mask_image is None else 1.0
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise ValueError(f"strength: got {shown(strength)}; expected a number above 0, and at most 1")
    return float(strength)


def is_latents(images: GivenImages) -> TypeGuard[torch.Tensor]:
    """Return True if images are latents already: tensors without three channels."""
    return torch.is_tensor(images) and images.shape[1] != RGB


def kept_size(images: GivenImages | None, factor: int, multiple: int, learned: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of given images in pixels, rounded down to a `multiple`.

    factor: pixels of one latent, in height and width. learned: height and width of the images that the model was
    trained on; returned without images. A warning is logged for much larger images. ValueError for images smaller than
    `multiple`.
    """
    if images is None:
        return learned
    height, width = images.shape[2:] if isinstance(images, torch.Tensor) else images[0].size[::-1]
    if is_latents(images):
        height, width = height * factor, width * factor
    if min(height, width) < multiple:
        raise ValueError(f"image: got {height} x {width} pixels; expected at least {multiple} x {multiple}")
    if height * width > MANY * learned[0] * learned[1]:
        logger.warning(
            "image: %d x %d pixels are drawn by a model of %d x %d; give height and width for another size",
            *(height, width, *learned),
        )
    return height // multiple * multiple, width // multiple * multiple


def given_images(
    name: str, given: Any, channels: int, background: str, latent_channels: int | None = None
) -> GivenImages:
    """Return the images in an argument of a call; ValueError if there are none, or if they are of different kinds.

    given: PIL images of 8 bits (transparent parts become `background`); arrays (height, width, C) or (N, height, width,
    C); tensors (C, height, width) or (N, C, height, width); or a list of one of these. Arrays and tensors are floats in
    [0, 1], or in [-1, 1] if any value is below 0. Masks may lack the axis of their one channel.
    latent_channels: tensors with this number of channels are latents; their values need not be in [-1, 1].
    """
    several = list(given) if isinstance(given, list | tuple) else [given]
    if several and all(isinstance(one, Image.Image) for one in several):
        return [_opaque(name, one, background) for one in several]
    kind = next((kind for kind in (np.ndarray, torch.Tensor) if all(isinstance(one, kind) for one in several)), None)
    if not several or kind is None:
        came = type(given).__name__ if several else "an empty list"
        raise ValueError(f"{name}: got {came}; expected an image of PIL, an array, a tensor, or a list of one of them")
    axis = -1 if kind is np.ndarray else -3
    batches = [_batch(name, one, axis, channels) for one in several]
    if len({batch.shape[1:] for batch in batches}) > 1:
        raise ValueError(f"{name}: got images of the sizes {[tuple(one.shape) for one in several]}; expected one size")
    images = torch.cat(batches)
    most = {channels: 1.0}
    if kind is torch.Tensor and latent_channels not in (None, RGB):
        most[latent_channels] = MAX_LATENT
    known = images.shape[1] in most and images.numel()
    if not known or not bool((images.abs() <= most[images.shape[1]]).all()) or (channels == 1 and images.min() < 0):
        raise _unusable(name, several[0], channels)
    return images / 2 + 0.5 if images.shape[1] == RGB and images.min() < 0 else images


def _batch(name: str, given: Any, axis: int, channels: int) -> torch.Tensor:
    """Return an array or tensor of floats as (N, C, height, width), float32; `axis` is that of its channels."""
    dense = not isinstance(given, torch.Tensor) or (given.layout == torch.strided and not given.is_meta)
    if given.ndim not in (2, 3, 4) or not dense or "float" not in str(given.dtype):
        raise _unusable(name, given, channels)
    # a copy of arrays with negative strides, such as mirrored ones: torch cannot read those
    one = torch.as_tensor(np.ascontiguousarray(given, np.float32) if isinstance(given, np.ndarray) else given).float()
    if channels == 1 and (one.ndim == 2 or (one.ndim == 3 and one.shape[axis] != 1)):
        one = one.unsqueeze(axis)
    if one.ndim == 2:
        raise _unusable(name, given, channels)
    one = one.movedim(axis, -3)
    return one if one.ndim == 4 else one[None]


def _unusable(name: str, given: Any, channels: int) -> ValueError:
    sizes = f"(N, {channels}, height, width)"
    if isinstance(given, np.ndarray):
        sizes = f"(N, height, width, {channels})"
    came = f"{given.dtype} of shape {tuple(given.shape)}"
    return ValueError(f"{name}: got {came}; expected floats in [0, 1] of shape {sizes}, or PIL images")


def _check_count(name: str, images: GivenImages, counts: tuple[int, int, int]) -> None:
    if len(images) not in counts:
        raise ValueError(f"{name}: got {len(images)} for {counts[-1]} images; expected one, or one a prompt")


def _opaque(name: str, image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # PIL's conversion would make them mostly white
        raise ValueError(f"{name}: got an image of mode {image.mode}; expected 8 bits, such as RGB, RGBA or L")
    image = image.convert("RGBA")
    behind = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(behind, image).convert("RGB")
