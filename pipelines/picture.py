"""Pictures to start from: another version of one, or parts of one drawn anew."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch.nn.functional import interpolate

from .inputs import shown


@dataclass(frozen=True)
class Picture:
    """What a sampling starts from besides noise (Meng et al. 2022; with a mask, Lugmayr et al. 2022)."""

    x0: torch.Tensor
    """One for each picture that is drawn, float32."""
    mask: torch.Tensor | None
    """(B, 1, h, w): 1 where it is drawn anew, 0 where it stays x0. None: anew everywhere."""
    noised: bool
    """Start from x0 with noise, not from noise alone."""

    def start(self, scheduler: Any, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return x_t at the first of `timesteps`, of unit `noise`, both (B, C, h, w)."""
        if not self.noised:
            x_t: torch.Tensor = noise * scheduler.init_noise_sigma
            return x_t
        noised: torch.Tensor = scheduler.add_noise(self.x0, noise, timesteps[:1].repeat(len(noise)))
        return noised

    def keep(self, scheduler: Any, noise: torch.Tensor, timesteps: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """Return `x_t`, whose next step is at the first of `timesteps`, with the noised x0 where that is kept."""
        if self.mask is None:
            return x_t
        known: torch.Tensor = self.x0
        if len(timesteps):
            known = scheduler.add_noise(known, noise, timesteps[:1])
        kept = (1 - self.mask) * known + self.mask * x_t
        return kept


def picture(
    processor: VaeImageProcessor,
    encode: Callable[[torch.Tensor, Any], torch.Tensor],
    image: Any,
    mask_image: Any,
    strength: float,
    size: tuple[int, int],
    shape: tuple[int, int, int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    num_images_per_prompt: int = 1,
) -> Picture | None:
    """Return what `image` and `mask_image`, in pixels, are in a model's space; None without an image.

    encode: from pictures in [-1, 1], (N, 3, H, W), and a generator or one for each to x0, which may be drawn.
    image, mask_image: PIL of 8 bits, a list of PIL, or a tensor in [0, 1], (N, 3, H, W) and (N, 1, H, W), resized to
    `size` pixels, height and width; N is 1, one a prompt, or one a picture of `shape`, the shape of the noise.
    Transparent parts of an image are white. The mask is white, from a half on, where the image is drawn anew; its
    transparent parts are black. strength: as `checked_strength` returns it; behind a mask, 1 begins with noise alone.
    ValueError if one of them is unusable.
    """
    if image is None:
        return None
    counts = 1, shape[0] // num_images_per_prompt, shape[0]
    pixel_values = processor.preprocess(_checked("image", image, 3, counts, "white"), *size).float()
    if isinstance(generator, list):
        pixel_values = pixel_values.repeat_interleave(shape[0] // len(pixel_values), 0)
    mask = None
    if mask_image is not None:
        grey = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True, vae_scale_factor=1)
        mask = grey.preprocess(_checked("mask_image", mask_image, 1, counts, "black"), *size)
        mask = interpolate(mask, size=shape[2:])
        mask = mask.repeat_interleave(shape[0] // len(mask), 0)
    x0 = encode(pixel_values, generator).float()
    x0 = x0.repeat_interleave(shape[0] // len(x0), 0)
    return Picture(x0, None if mask is None else mask.to(x0), noised=mask is None or strength < 1)


def checked_strength(strength: float | None, image: Any, mask_image: Any) -> float:
    """Return the share of the steps that are taken: of the stock pipelines if None; ValueError if it cannot be one."""
    if image is None and (mask_image is not None or strength is not None):
        name = "strength" if mask_image is None else "mask_image"
        raise ValueError(f"{name}: got no image that it could be about; give image too, or leave it out")
    if strength is None:
        return 0.8 if image is not None and mask_image is None else 1.0
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise ValueError(f"strength: got {shown(strength)}; expected a number above 0, and at most 1")
    return float(strength)


def _checked(name: str, image: Any, channels: int, counts: tuple[int, int, int], background: str) -> Any:
    """Return `image`, as many as one of `counts`, as diffusers' image processors take it."""
    images = [image] if isinstance(image, Image.Image) else image
    if torch.is_tensor(images):
        good = images.ndim == 4 and images.shape[1] == channels and images.is_floating_point() and images.numel()
        if not good or not bool(((images >= 0) & (images <= 1)).all()):
            came = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"{name}: got {came}; expected floats in [0, 1] of shape (N, {channels}, height, width)")
    elif not isinstance(images, list | tuple) or not all(isinstance(one, Image.Image) for one in images):
        raise ValueError(f"{name}: got {type(image).__name__}; expected a picture of PIL, a list of them, or a tensor")
    if len(images) not in counts:
        raise ValueError(f"{name}: got {len(images)} for {counts[-1]} pictures; expected one, or one a prompt")
    return images if torch.is_tensor(images) else [_opaque(name, one, background) for one in images]


def _opaque(name: str, image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # what PIL makes of them is white, mostly
        raise ValueError(f"{name}: got a picture of mode {image.mode}; expected 8 bits, such as RGB, RGBA or L")
    image = image.convert("RGBA")
    behind = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(behind, image).convert("RGB")
