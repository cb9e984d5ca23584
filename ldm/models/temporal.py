"""Temporal layers between the layers of an image network, which stays as it is (Blattmann et al. 2023, section 3.1).

This file is saved beside the weights, and imports nothing but torch and diffusers.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

CONTEXT = "context"
"""Key of the `Context` among the temporal layers; no layer of a network has this path."""
ALPHA = 0.9
"""Share of the image layer's output before training. At 1 the temporal layer would get no gradient."""


@dataclass
class Clip:
    """The clip that a network computes just now; it is no part of the network and is not copied with it."""

    num_frames: int = 1
    states: Tensor | None = None
    """The text states, (B, L, D), one row for each clip."""
    context: Tensor | None = None
    """The known frames and their mask, (B, C, F, h, w); see `Context`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Clip":
        """Return a new one: tensors of a graph cannot be copied."""
        return Clip()


class TemporalConvolution(nn.Module):
    """A residual branch of two convolutions over time, 3 x 1 x 1; zero before training."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)) for _ in range(2))
        _zero(self.conv2)

    def forward(self, frames: Tensor, clip: Clip) -> Tensor:
        """Return the branch of frames, (B * F, C, h, w), each beside the frames of its clip."""
        x = frames.view(-1, clip.num_frames, *frames.shape[1:]).transpose(1, 2)  # (B, C, F, h, w)
        x = self.conv1(nn.functional.silu(self.norm1(x)))
        x = self.conv2(nn.functional.silu(self.norm2(x)))
        return cast(Tensor, x.transpose(1, 2).flatten(0, 1))


class TemporalAttention(nn.Module):
    """A residual branch: each place attends to itself in the other frames, then to the text; zero before training."""

    def __init__(self, channels: int, groups: int, head_dim: int, states_dim: int):
        super().__init__()
        heads = max(1, channels // head_dim)
        sizes = {"heads": heads, "dim_head": channels // heads}
        self.norm = nn.GroupNorm(groups, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.time = Attention(channels, **sizes)
        self.text = Attention(channels, cross_attention_dim=states_dim, **sizes)
        self.feed_forward = FeedForward(channels, activation_fn="geglu")
        self.proj_out = nn.Linear(channels, channels)
        _zero(self.proj_out)

    def forward(self, frames: Tensor, clip: Clip) -> Tensor:
        """Return the branch of frames, (B * F, C, h, w), each beside the frames of its clip."""
        count, channels, height, width = frames.shape
        batch, num_frames = count // clip.num_frames, clip.num_frames
        x = self.norm(frames).unflatten(0, (batch, num_frames)).permute(0, 3, 4, 1, 2)  # (B, h, w, F, C)
        x = x.reshape(-1, num_frames, channels) + frame_positions(num_frames, channels).to(x)
        x = x + self.time(self.norm1(x))
        x = x.reshape(batch, -1, channels)  # the text is read once for each clip
        x = x + self.text(self.norm2(x), encoder_hidden_states=clip.states)
        x = self.proj_out(x + self.feed_forward(self.norm3(x)))
        x = x.reshape(batch, height, width, num_frames, channels).permute(0, 3, 4, 1, 2)
        return cast(Tensor, x.reshape(frames.shape))


class Context(nn.Module):
    """A layer for the known frames, added to the output of the image network's first layer; zero before training.

    It is the same as more input channels of that layer, whose own weights stay as they are, and it sees the frames
    before and after too (Blattmann et al. 2023, section 3.2: a mask, and the masked latents).
    """

    def __init__(self, context_channels: int, channels: int):
        super().__init__()
        self.conv = nn.Conv3d(context_channels, channels, 3, padding=1)
        _zero(self.conv)

    def forward(self, frames: Tensor, clip: Clip) -> Tensor:
        """Return the frames, (B * F, C, h, w), with the context of their clips."""
        context = cast(Tensor, clip.context).to(self.conv.weight.dtype)
        return frames + cast(Tensor, self.conv(context)).transpose(1, 2).flatten(0, 1)


class Mixed(nn.Module):
    """An image layer's output z mixed with a temporal layer's: ``alpha z + (1 - alpha) l(z)``, alpha in (0, 1).

    As l(z) is z plus a branch that is zero before training, the sum is then z to the last bit, for any alpha, and the
    branch has a gradient. Alpha is a sigmoid: clipped, it would have no gradient once it passed 1.
    """

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch
        self.logit = nn.Parameter(torch.logit(torch.tensor([ALPHA])))

    @property
    def alpha(self) -> Tensor:
        """The share of the image layer's output, (1,)."""
        return self.logit.sigmoid()

    def forward(self, frames: Tensor, clip: Clip) -> Tensor:
        """Return the mixture for frames, (B * F, C, h, w)."""
        return cast(Tensor, frames + (1 - self.alpha) * self.branch(frames, clip))


def frame_positions(num_frames: int, channels: int) -> Tensor:
    """Return sinusoidal positions of the frames, (F, C) (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, channels, 2) / channels)
    angles = torch.arange(num_frames)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :channels]


def attach(network: nn.Module, clip: Clip, made: Callable[[nn.Module], nn.Module | None]) -> nn.ModuleDict:
    """Return the temporal layers that `made` returns for layers of `network`, each called after its layer from now on.

    The keys are the paths of the layers, with "-" for ".". Nothing of the network changes: each layer gets a hook.
    For single images, ``clip.num_frames`` 1, the hooks do nothing.
    """
    layers = nn.ModuleDict()
    for name, module in [*network.named_modules()]:
        if (branch := made(module)) is not None:
            key = name.replace(".", "-")
            layers[key] = Mixed(branch)
            module.register_forward_hook(partial(_after, layers, key, clip))
    return layers


def _after(layers: nn.ModuleDict, key: str, clip: Clip, module: nn.Module, given: Any, output: Any) -> Any:
    """Return a layer's output, a tensor or a tuple of one, as its temporal layer changes it."""
    if clip.num_frames == 1:
        return output
    # in channels_last, torch 2.13 crashes on CPU in the backward pass of group norms, of clips and of frozen ones
    if isinstance(output, tuple):
        return layers[key](output[0].contiguous(), clip), *output[1:]
    return layers[key](output.contiguous(), clip)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def with_arguments_of(kind: type[Any]) -> Callable[[Any], Any]:
    """Return a decorator for an ``__init__`` with ``**others``: these are the arguments of `kind`'s, by its signature.

    Diffusers reads the names of a config from the signature.
    """

    def decorate(init: Any) -> Any:
        own = [one for one in inspect.signature(init).parameters.values() if one.kind != one.VAR_KEYWORD]
        others = [*inspect.signature(kind.__init__).parameters.values()][1:]
        keywords = [one.replace(kind=one.KEYWORD_ONLY) for one in (*others, *own[1:])]
        init.__signature__ = inspect.Signature([own[0], *keywords])
        return init

    return decorate


class VideoUNet(UNet2DConditionModel):  # type: ignore[misc]
    """A U-Net of images with temporal layers: convolutions after residual blocks, attentions after transformers.

    Its weights are those of the image network, under their own names, and ``temporal.*``. Single images, (B, C, h, w),
    pass the image network alone; clips are (B, C, F, h, w). With `context_channels`, clips may have so many channels
    more: a mask and the known frames, as `Context` takes them; without them no frame is known.
    """

    _source = Path(__file__).read_text(encoding="utf-8")
    """Source of this module: a pipeline saves it beside the weights."""

    @register_to_config  # type: ignore[untyped-decorator]
    @with_arguments_of(UNet2DConditionModel)
    def __init__(self, temporal_head_dim: int = 32, context_channels: int = 0, **others: Any):
        super().__init__(**others)
        config = self.config
        groups, states_dim = config.norm_num_groups, config.encoder_hid_dim or config.cross_attention_dim
        if not isinstance(states_dim, int):
            raise ValueError("cross_attention_dim: one for each level; expected a number, or encoder_hid_dim")

        def made(module: nn.Module) -> nn.Module | None:
            if isinstance(module, ResnetBlock2D) and not (module.up or module.down):
                return TemporalConvolution(module.out_channels, groups)
            if isinstance(module, Transformer2DModel):
                return TemporalAttention(module.in_channels, groups, temporal_head_dim, states_dim)
            return None

        self.clip = Clip()
        self.temporal = attach(self, self.clip, made)
        if not any(isinstance(layer.branch, TemporalAttention) for layer in self.temporal.values()):
            raise ValueError("none of its blocks has a transformer (CrossAttn...); expected one, which reads the text")
        if context_channels:
            self.temporal[CONTEXT] = Context(context_channels, config.block_out_channels[0])
            self.conv_in.register_forward_hook(partial(_after, self.temporal, CONTEXT, self.clip))

    @classmethod
    def over(cls, network: UNet2DConditionModel, **arguments: Any) -> "VideoUNet":
        """Return a network with the weights of an image network, and new temporal layers; `arguments` are theirs."""
        return cast("VideoUNet", _over(cls, UNet2DConditionModel, network, **arguments))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Return ``.sample``, shaped like clips (B, C, F, h, w) or images (B, C, h, w), with the output channels.

        All other arguments have one row for each clip, as of images.
        """
        if sample.ndim == 4:
            self.clip.num_frames, self.clip.states, self.clip.context = 1, None, None
            return super().forward(sample, timestep, encoder_hidden_states, return_dict=return_dict, **kwargs)
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states: got None; expected text states: the temporal layers read them")
        batch, num_frames = len(sample), sample.shape[2]
        # kept until the next call: gradient checkpointing computes layers again in the backward pass
        self.clip.num_frames, self.clip.states = num_frames, encoder_hidden_states
        sample, self.clip.context = self._apart(sample)
        frames = sample.transpose(1, 2).flatten(0, 1)
        repeated = partial(_repeated, batch=batch, times=num_frames)
        output = super().forward(
            frames,
            repeated(timestep),
            repeated(encoder_hidden_states),
            return_dict=False,
            **{name: repeated(value) for name, value in kwargs.items()},
        )[0]
        output = output.unflatten(0, (batch, num_frames)).transpose(1, 2)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def _apart(self, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the channels of the image network and those of the context, zeros if they are left out."""
        own, more = self.config.in_channels, self.config.context_channels
        if sample.shape[1] not in (own, own + more):
            raise ValueError(f"sample: got {sample.shape[1]} channels; expected {own}, or {own + more} with a context")
        if not more:
            return sample, None
        left_out = sample.shape[1] == own
        context = sample.new_zeros(len(sample), more, *sample.shape[2:]) if left_out else sample[:, own:]
        return sample[:, :own], context


class VideoAutoencoder(AutoencoderKL):  # type: ignore[misc]
    """An autoencoder of images whose decoder has temporal layers: convolutions over time after its residual blocks.

    Its weights are those of the image autoencoder, under their own names, and ``temporal.*``. Clips, (B, 3, F, H, W),
    are encoded frame by frame, to (B, C, F, h, w), and decoded as clips; single images pass the image network alone.
    """

    _source = Path(__file__).read_text(encoding="utf-8")
    """Source of this module: a pipeline saves it beside the weights."""

    @register_to_config  # type: ignore[untyped-decorator]
    @with_arguments_of(AutoencoderKL)
    def __init__(self, **others: Any):
        super().__init__(**others)
        groups = self.config.norm_num_groups

        def made(module: nn.Module) -> nn.Module | None:
            return TemporalConvolution(module.out_channels, groups) if isinstance(module, ResnetBlock2D) else None

        self.clip = Clip()
        self.temporal = attach(self.decoder, self.clip, made)
        for attention in filter(None, self.decoder.mid_block.attentions):  # returns channels_last, see `_after`
            attention.register_forward_hook(_contiguous)

    @classmethod
    def over(cls, network: AutoencoderKL) -> "VideoAutoencoder":
        """Return an autoencoder with the weights of one of images, and new temporal layers in the decoder."""
        return cast("VideoAutoencoder", _over(cls, AutoencoderKL, network))

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Return ``.latent_dist`` of images (B, 3, H, W), or of clips (B, 3, F, H, W), each frame as an image."""
        if x.ndim == 4:
            return super().encode(x, return_dict=return_dict)
        found = super().encode(x.transpose(1, 2).flatten(0, 1), return_dict=False)[0].parameters
        posterior = DiagonalGaussianDistribution(found.unflatten(0, (len(x), x.shape[2])).transpose(1, 2))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Return ``.sample``, images (B, 3, H, W) of (B, C, h, w), or clips (B, 3, F, H, W) of (B, C, F, h, w)."""
        self.clip.num_frames = 1 if z.ndim == 4 else z.shape[2]
        if z.ndim == 4:
            return super().decode(z, return_dict=return_dict, generator=generator)
        # sliced by clips: the frames of one are decoded together
        parts = torch.split(z, 1 if self.use_slicing else len(z))
        frames = torch.cat([self._decode(part.transpose(1, 2).flatten(0, 1)).sample for part in parts])
        clips = frames.view(len(z), -1, *frames.shape[1:]).transpose(1, 2)
        return DecoderOutput(sample=clips) if return_dict else (clips,)


def _contiguous(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    """Return a layer's output in the usual order of memory."""
    return output.contiguous()


def _over(kind: type[Any], image_kind: type[Any], network: nn.Module, **arguments: Any) -> nn.Module:
    """Return a `kind` with the weights of an image network; `arguments` are those that `image_kind` does not have."""
    known = inspect.signature(image_kind.__init__).parameters  # a config of others may have more keys
    config = {name: value for name, value in cast(Any, network).config.items() if name in known}
    found = cast(nn.Module, kind(**config, **arguments))
    missing, unexpected = found.load_state_dict(network.state_dict(), strict=False)
    if unexpected or any(not name.startswith("temporal.") for name in missing):
        raise ValueError(f"{type(network).__name__}: its weights do not fit a {kind.__name__}: {missing} {unexpected}")
    return found


def _repeated(value: Any, batch: int, times: int) -> Any:
    """Return tensors of `batch` rows with each row `times` times in a row, also those in mappings."""
    if isinstance(value, Mapping):
        return {name: _repeated(one, batch, times) for name, one in value.items()}
    if torch.is_tensor(value) and value.ndim and len(value) == batch:
        return value.repeat_interleave(times, 0)
    return value
