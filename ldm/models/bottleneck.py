"""The bottlenecks of autoencoders: what lies between encoder and decoder, its loss, and the scale of the latents.

Each class of autoencoders has one. It keeps no state: what it needs is in the autoencoder, or given to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import SpatialNorm
from torch import Tensor, nn

from ldm.config import ReconstructionConfig


class Bottleneck(Protocol):
    """The bottleneck of one class of autoencoders."""

    def prepare(self, autoencoder: nn.Module) -> None:
        """Set, before a training, what the config of the class does not hold."""

    def channels(self, autoencoder: nn.Module) -> int:
        """Return the number of channels of the latents."""

    def reconstruct(
        self, autoencoder: nn.Module, pixel_values: Tensor, noise: Tensor, config: ReconstructionConfig
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the reconstructions of a training, (B, 3, H, W), the terms of the loss and what is seen.

        noise: (B, C, h, w), from N(0, I). Terms: scalars by name, without the weight ``reconstruction.NAME_weight``.
        Seen: what `after_step` needs, tensors whose first axis is that of the images.
        """

    def memory(self, autoencoder: nn.Module) -> dict[str, Tensor]:
        """Return what is kept from step to step, at the first one."""

    def after_step(
        self,
        autoencoders: Sequence[nn.Module],
        memory: Mapping[str, Tensor],
        seen: Mapping[str, Tensor],
        most_steps: int,
        draw: torch.Generator,
    ) -> None:
        """Change `memory`, and the trained and the averaged autoencoder, by what a whole step has seen."""

    def measures(self, autoencoder: nn.Module, pixel_values: Sequence[Tensor]) -> dict[str, float]:
        """Return numbers by name that tell of the use of the bottleneck by batches of images."""

    def fold(self, autoencoder: nn.Module, mean: Tensor, std: Tensor) -> None:
        """Bring latents to zero mean and unit std, in place, without changing any reconstruction.

        `mean` and `std`, (C,) float64, are those of the latents of the training images. After it the config's
        ``scaling_factor`` is 1 and there is no shift, so that no pipeline can get the scale wrong. ValueError if they
        are not finite, or a std is not above 0.
        """

    def fold_config(self, autoencoder: nn.Module) -> None:
        """Fold what the config says of the latents' scale, as far as not all pipelines read it, into the weights."""


class GaussianBottleneck:
    """The diagonal Gaussian of an AutoencoderKL: latents are sampled from it (Kingma & Welling 2014)."""

    def prepare(self, autoencoder: Any) -> None:
        """Set nothing."""

    def channels(self, autoencoder: Any) -> int:
        """Return the number of channels of the latents."""
        return int(autoencoder.config.latent_channels)

    def reconstruct(
        self, autoencoder: Any, pixel_values: Tensor, noise: Tensor, config: ReconstructionConfig
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Decode a sample; the term ``kl`` is the KL to N(0, I), divided by the number of values of an image."""
        posterior = autoencoder.encode(pixel_values).latent_dist
        reconstruction = autoencoder.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        kl = kl_to_standard_normal(posterior.mean, posterior.logvar).mean() / pixel_values[0].numel()
        return reconstruction, {"kl": kl}, {}

    def memory(self, autoencoder: Any) -> dict[str, Tensor]:
        """Return nothing: no step needs what was before it."""
        return {}

    def after_step(
        self,
        autoencoders: Sequence[Any],
        memory: Mapping[str, Tensor],
        seen: Mapping[str, Tensor],
        most_steps: int,
        draw: torch.Generator,
    ) -> None:
        """Change nothing."""

    def measures(self, autoencoder: Any, pixel_values: Sequence[Tensor]) -> dict[str, float]:
        """Return nothing."""
        return {}

    @torch.no_grad()
    def fold(self, autoencoder: Any, mean: Tensor, std: Tensor) -> None:
        """Bring each channel to zero mean and unit std.

        ``quant_conv`` then returns ``(mean - m) / s`` and ``logvar - 2 log s``, and ``post_quant_conv`` undoes it. An
        autoencoder without these two layers gets them: the 3 x 3 convolutions beside them pad with zeros, so that a
        mean cannot be folded into those exactly.
        """
        _refuse_dead(mean, std)
        channels = len(mean)
        encode, back = _pointwise(autoencoder, "quant_conv"), _pointwise(autoencoder, "post_quant_conv")
        assert encode.bias is not None  # noqa: S101  (AutoencoderKL builds both with bias)
        weight, bias = encode.weight.double(), encode.bias.double()
        weight[:channels] /= std[:, None, None, None]
        bias[:channels] = (bias[:channels] - mean) / std
        bias[channels:] -= 2 * std.log()
        encode.weight.copy_(weight)
        encode.bias.copy_(bias)
        _take_back(back, mean, std)
        autoencoder.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)

    def fold_config(self, autoencoder: Any) -> None:
        """Fold the latents' shift or mean and std in the config into the weights; do nothing if it has none.

        The denoiser's input is ``(z - shift_factor) * scaling_factor`` for the autoencoders of Stable Diffusion 3 and
        Flux, and ``(z - latents_mean) * scaling_factor / latents_std`` in the pipeline of Stable Diffusion XL. The
        pipelines of Stable Diffusion know only ``scaling_factor``: after folding, that is enough.

        Raises:
            ValueError: the config has both forms, or one of the two statistics; no pipeline of diffusers reads that.

        """
        config = autoencoder.config
        shift, mean, std = (config.get(key) for key in ("shift_factor", "latents_mean", "latents_std"))
        if not shift and mean is None and std is None:
            return
        if (mean is None) != (std is None) or (shift and mean is not None):
            raise ValueError(
                f"the autoencoder's config has shift_factor {shift}, latents_mean {mean} and latents_std {std}; "
                "expected shift_factor alone, or latents_mean and latents_std together"
            )
        channels = config.latent_channels
        # float32, as checkpoints know the folded weights by their hash
        mean = torch.as_tensor(shift if mean is None else mean).float().expand(channels)
        std = torch.as_tensor(1.0 if std is None else std).float().expand(channels)
        self.fold(autoencoder, mean.double(), (std / config.scaling_factor).double())


class CodebookBottleneck:
    """The codebook of a VQModel: each latent becomes the nearest of its codes (van den Oord et al. 2017).

    A VQModel whose ``norm_type`` is spatial is a MoVQ (Zheng et al. 2022): its decoder sees the codes at every layer.
    Denoisers work on the latents before the codebook, and these are decoded as they are, as in Kandinsky's pipelines.
    """

    def prepare(self, autoencoder: Any) -> None:
        """Put the weight 0.25 on the commitment, equation 3 of van den Oord et al.; diffusers puts it on the codes."""
        autoencoder.quantize.legacy = False

    def channels(self, autoencoder: Any) -> int:
        """Return the number of channels of a code."""
        return int(autoencoder.quantize.vq_embed_dim)

    def reconstruct(
        self, autoencoder: Any, pixel_values: Tensor, noise: Tensor, config: ReconstructionConfig
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Decode the nearest codes, or for a share of the images the latents as they are: see `codebook_share`.

        The term ``codebook`` brings codes and latents together, a mean over values. The gradient of the codes is that
        of the latents (straight-through).
        """
        latents = autoencoder.encode(pixel_values).latents.float()
        codes, loss, (_, _, indices) = autoencoder.quantize(latents)
        share = torch.special.ndtr(noise.flatten(1)[:, :1]).view(-1, 1, 1, 1)  # uniform, one number for each image
        decoded = torch.where(share < config.codebook_share, codes, latents)
        reconstruction = autoencoder.decode(decoded, force_not_quantize=True).sample
        seen = {"latents": latents.detach(), "indices": indices.view(len(latents), *latents.shape[2:])}
        return reconstruction, {"codebook": loss}, seen

    def memory(self, autoencoder: Any) -> dict[str, Tensor]:
        """Return ``unused_steps``, (codes,) int64: the steps since each code was last the nearest one of a latent."""
        return {"unused_steps": torch.zeros(autoencoder.quantize.n_e, dtype=torch.int64)}

    @torch.no_grad()
    def after_step(
        self,
        autoencoders: Sequence[Any],
        memory: Mapping[str, Tensor],
        seen: Mapping[str, Tensor],
        most_steps: int,
        draw: torch.Generator,
    ) -> None:
        """Move codes that were not used for `most_steps` to latents of the step, drawn at random.

        A code that is never the nearest has no gradient, and stays where it is for ever. After Dhariwal et al. 2020
        (Jukebox, section 3.1), who move a code whose use is below a limit.
        """
        unused_steps = memory["unused_steps"]
        unused_steps += 1
        unused_steps[seen["indices"].flatten().cpu()] = 0
        dead = (unused_steps >= most_steps).nonzero().flatten()
        latents = seen["latents"].movedim(1, -1).flatten(0, -2)
        dead = dead[torch.randperm(len(dead), generator=draw)[: len(latents)]]
        chosen = latents[torch.randperm(len(latents), generator=draw)[: len(dead)].to(latents.device)]
        for autoencoder in autoencoders:
            weight = autoencoder.quantize.embedding.weight
            weight[dead.to(weight.device)] = chosen.to(weight)
        unused_steps[dead] = 0

    @torch.no_grad()
    def measures(self, autoencoder: Any, pixel_values: Sequence[Tensor]) -> dict[str, float]:
        """Return ``codes_used``, the codes that are nearest of some latent, and the perplexity of their use.

        The perplexity is the exponential of the entropy: the number of codes that would do, if all were used alike.
        """
        codebook = autoencoder.quantize
        latents = (autoencoder.encode(part.to(codebook.embedding.weight.device)).latents for part in pixel_values)
        found = [codebook(part.float())[2][2].flatten().cpu() for part in latents]
        counts = torch.bincount(torch.cat(found), minlength=codebook.n_e).double()
        shares = counts / counts.sum()
        return {"codes_used": float((counts > 0).sum()), "perplexity": float(torch.special.entr(shares).sum().exp())}

    @torch.no_grad()
    def fold(self, autoencoder: Any, mean: Tensor, std: Tensor) -> None:
        """Bring each channel to zero mean, and all of them together to unit std.

        One std, the root mean square, keeps the order of distances, so that each latent keeps its code. The codes are
        moved with the latents; ``post_quant_conv`` and the spatial norms of the decoder, which see them, undo it.
        """
        _refuse_dead(mean, std)
        std = std.square().mean().sqrt().expand_as(mean)
        encode, codes = autoencoder.quant_conv, autoencoder.quantize.embedding.weight
        encode.bias.copy_((encode.bias.double() - mean) / std)
        encode.weight.copy_(encode.weight.double() / std[:, None, None, None])
        codes.copy_((codes.double() - mean) / std)
        _take_back(autoencoder.post_quant_conv, mean, std)
        for norm in autoencoder.decoder.modules():
            if isinstance(norm, SpatialNorm):
                _take_back(norm.conv_y, mean, std)
                _take_back(norm.conv_b, mean, std)
        autoencoder.register_to_config(scaling_factor=1.0)

    def fold_config(self, autoencoder: Any) -> None:
        """Fold ``scaling_factor`` into the weights: LDMPipeline divides by it, the pipelines of Kandinsky do not."""
        if (factor := autoencoder.config.scaling_factor) != 1:
            mean = torch.zeros(self.channels(autoencoder), dtype=torch.float64)
            self.fold(autoencoder, mean, 1 / torch.full_like(mean, factor))


BOTTLENECKS: dict[str, Bottleneck] = {
    **dict.fromkeys(("AutoencoderKL", "VideoAutoencoder"), GaussianBottleneck()),
    "VQModel": CodebookBottleneck(),
}
"""The bottleneck of each class of autoencoders."""


def bottleneck_of(autoencoder: nn.Module) -> Bottleneck:
    """Return the bottleneck of an autoencoder."""
    return BOTTLENECKS[type(autoencoder).__name__]


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, I)) in nats, (B,), summed over the latent (Kingma & Welling 2014, B)."""
    return 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).flatten(1).sum(1)


def _refuse_dead(mean: Tensor, std: Tensor) -> None:
    """Raise ValueError if latents cannot be brought to unit scale."""
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"latents of channel {int(std.argmin())} have std {float(std.min())}; expected > 0")


def _take_back(layer: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    """Let a 1 x 1 convolution see ``std * x + mean`` for x, in place; computed in float64."""
    assert layer.bias is not None  # noqa: S101  (the classes build it with bias)
    weight = layer.weight.double()
    layer.bias.copy_(layer.bias.double() + weight[:, :, 0, 0] @ mean)
    layer.weight.copy_(weight * std[None, :, None, None])


def _pointwise(autoencoder: Any, name: str) -> nn.Conv2d:
    """Return the 1 x 1 convolution `name`; if there is none, add the identity, in place."""
    if getattr(autoencoder, name) is None:
        like = autoencoder.decoder.conv_in.weight
        channels = 2 * like.shape[1] if name == "quant_conv" else like.shape[1]
        made = nn.Conv2d(channels, channels, 1, device="meta", dtype=like.dtype).to_empty(
            device=like.device
        )  # no random initialisation, which would advance the global generator
        made.load_state_dict({"weight": torch.eye(channels)[:, :, None, None], "bias": torch.zeros(channels)})
        setattr(autoencoder, name, made)
        autoencoder.register_to_config(**{f"use_{name}": True})
    found: nn.Conv2d = getattr(autoencoder, name)
    return found
