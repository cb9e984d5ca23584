"""Networks of diffusers, built from the keys of their own ``config.json`` or loaded from a folder or the Hub."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ldm.config import TemporalConfig, TemporalDecoderConfig
from ldm.config.places import pinned
from ldm.errors import ConfigError, explained
from ldm.machine import memory_bytes
from ldm.models.component import find_component
from ldm.models.foreign import refuse_strange_shards
from ldm.models.temporal import VideoAutoencoder, VideoUNet

N = TypeVar("N", bound=nn.Module)
OWN: dict[str, type[nn.Module]] = {"VideoUNet": VideoUNet, "VideoAutoencoder": VideoAutoencoder}
"""Networks of our own, by the names of their classes; all others are diffusers'."""
AUTOENCODERS = ("AutoencoderKL", "VQModel", "VideoAutoencoder")
DENOISERS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "PriorTransformer",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "VideoUNet",
)
COMPONENTS = {
    **dict.fromkeys(("vae", "movq", "vqvae"), AUTOENCODERS),
    **dict.fromkeys(("unet", "transformer", "prior"), DENOISERS),
}
"""Classes that are allowed here for each name of a network in diffusers' pipelines."""
LAST_LAYERS = ("conv_out", "proj_out", "proj_out_2", "proj_to_clip_embeddings")
"""Names of the last layer in the denoisers of diffusers."""


def build_network(
    network: dict[str, Any], where: str, classes: Collection[str] = (*AUTOENCODERS, *DENOISERS)
) -> nn.Module:
    """Return the network that `network` describes: new with random weights, or pretrained.

    New: `network` holds ``_class_name``, one of `classes`, and arguments of that class's ``__init__``.
    Pretrained: it holds ``pretrained``, the folder or Hub name (``user/name@revision`` too) of the network or of a
    pipeline with it, and optionally ``revision`` and ``subfolder``; its own config names the class.
    A ConfigError names the config path `where`.
    """
    keys = dict(network)
    folder, name = keys.pop("pretrained", None), keys.pop("_class_name", None)
    if folder is not None:
        refuse_unknown(keys, {"revision", "subfolder"}, where, "beside 'pretrained'")
        if "revision" in keys and pinned(str(folder))[1]:
            raise ConfigError(f"{where}.revision: given twice; leave it out, or the @ in {where}.pretrained")
        names = [component for component, kinds in COMPONENTS.items() if not set(kinds).isdisjoint(classes)]
        with explained(where):
            folder, keys = find_component(str(folder), names, **keys)
            name = diffusers.UNet2DModel.load_config(folder, **keys).get("_class_name")
    if name not in classes:
        raise ConfigError(f"{where}._class_name: got {name!r}; choose from {', '.join(classes)}")
    kind: Any = OWN.get(name) or getattr(diffusers, name)
    if folder is not None:
        with explained(where):
            refuse_strange_shards(Path(folder, keys.get("subfolder") or ""))
            # low_cpu_mem_usage would leave parameters that the folder lacks on the meta device
            loaded: nn.Module = kind.from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=True, **keys)
        return loaded
    refuse_unknown(keys, set(inspect.signature(kind.__init__).parameters) - {"self"}, where, f"of {name}")
    return built(lambda: kind(**keys), where, name)


def built(build: Callable[[], nn.Module], where: str, name: str) -> nn.Module:
    """Return the network that `build` returns; `name` is its class for messages.

    It is built on the meta device first, without weights. If that fails, or if the weights are too large for this
    machine's memory, a ConfigError names the config path `where`.
    """
    with explained(f"{where}: {name} refuses these values"), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            network = build()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        if (needed := 4 * parameters) > (memory := memory_bytes()):
            raise ConfigError(
                f"{where}: {name} with these values has {parameters:,} parameters, which need "
                f"{needed / 2**30:,.1f} GiB; this machine has {memory / 2**30:,.1f} GiB of memory"
            )
    with explained(where):
        return build()


def refuse_unknown(keys: Collection[str], allowed: Collection[str], where: str, what: str) -> None:
    """Raise ConfigError if one of the keys at `where` is not `allowed`; it suggests the most similar allowed key."""
    for key in keys:
        if key not in allowed:
            close = difflib.get_close_matches(key, sorted(allowed), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{where}.{key}: no such field {what}{hint}")


TOKEN_STD = 0.02
"""Standard deviation of a prior's own tokens before training, as of a CLIP's."""


def prepare_denoiser(denoiser: Any, *, fresh: bool) -> None:
    """Prepare a network of diffusers for training, in place.

    The statistics of embeddings are frozen. The label embedding's dropout is switched off, since the conditioner drops
    labels. A `fresh` network, with random weights, also gets `zero_tails`, and a prior a std of 1 in its statistics and
    random tokens of its own.
    """
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    if isinstance(denoiser, PriorTransformer):
        denoiser.clip_mean.requires_grad_(False)
        denoiser.clip_std.requires_grad_(False)
        if fresh:  # diffusers initialises them with zeros, which would make every embedding zero
            nn.init.ones_(denoiser.clip_std)
            # zeros too: the output is read from such a token, and with zero tails no gradient would ever pass it
            for token in (denoiser.prd_embedding, denoiser.positional_embedding):
                if token is not None:
                    nn.init.normal_(token, std=TOKEN_STD)
    if fresh:
        zero_tails(denoiser)


def with_temporal_layers(denoiser: nn.Module, config: TemporalConfig, given_frames: bool = False) -> VideoUNet:
    """Return a denoiser of clips: `denoiser` with the temporal layers that it lacks.

    given_frames: it is conditioned on known frames, a mask and their latents (`FramesConditioner`). The layers of the
    image network are frozen if the config says so.
    """
    if not isinstance(denoiser, UNet2DConditionModel):
        raise ConfigError(f"temporal: a {type(denoiser).__name__} takes none; expected a UNet2DConditionModel")
    if isinstance(denoiser, VideoUNet) and (width := denoiser.config.temporal_head_dim) != config.head_dim:
        raise ConfigError(f"temporal.head_dim: got {config.head_dim}; expected {width}, as in denoiser")
    found: VideoUNet
    context_channels = 1 + denoiser.config.in_channels if given_frames else 0
    if isinstance(denoiser, VideoUNet) and context_channels <= denoiser.config.context_channels:
        found = denoiser
    else:
        with explained("temporal"):
            found = VideoUNet.over(denoiser, temporal_head_dim=config.head_dim, context_channels=context_channels)
    if config.freeze_image_layers:
        found.requires_grad_(False)
        found.temporal.requires_grad_(True)
    return found


def with_temporal_decoder(autoencoder: nn.Module, config: TemporalDecoderConfig) -> VideoAutoencoder:
    """Return an autoencoder whose decoder has temporal layers: new ones if it has none.

    Its encoder is frozen, so that the latents stay what they are, and so is the image network of its decoder if the
    config says so.
    """
    found: VideoAutoencoder
    if isinstance(autoencoder, VideoAutoencoder):
        found = autoencoder
    elif isinstance(autoencoder, AutoencoderKL):
        found = VideoAutoencoder.over(autoencoder)
    else:
        raise ConfigError(f"temporal: a {type(autoencoder).__name__} takes none; expected an AutoencoderKL")
    found.requires_grad_(False)
    found.temporal.requires_grad_(True)
    found.decoder.requires_grad_(not config.freeze_image_layers)
    return found


def keep_statistics(denoiser: Any, mean: Tensor, std: Tensor) -> None:
    """Write the mean and std of embeddings, (D,), into the denoiser, where its pipeline reads them."""
    if not isinstance(denoiser, PriorTransformer):
        raise ValueError(f"denoiser: {type(denoiser).__name__} predicts no embeddings; use PriorTransformer")
    if denoiser.clip_mean.shape[1] != len(mean):
        raise ValueError(
            f"denoiser: predicts embeddings of width {denoiser.clip_mean.shape[1]}, the space has {len(mean)}; set "
            f"denoiser.embedding_dim or clip_embed_dim to {len(mean)}"
        )
    with torch.no_grad():
        denoiser.clip_mean.copy_(mean)
        denoiser.clip_std.copy_(std)


def zero_tails(denoiser: nn.Module) -> None:
    """Zero the last layer of the network and of each residual branch, in place.

    The network then starts as the zero function and every block as the identity ("zero_module" of Dhariwal & Nichol
    2021; diffusers zeroes nothing). So the first loss is the variance of the target; a random output would add to it.
    """
    tails = [getattr(denoiser, name, None) for name in LAST_LAYERS]
    whole = [module for module in denoiser.modules() if isinstance(module, Transformer2DModel)]
    inside = {block for module in whole for block in module.modules()}  # such a module is one residual branch
    for module in denoiser.modules():
        if isinstance(module, ResnetBlock2D):
            tails.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            tails.append(module.proj_out)
        elif isinstance(module, Attention) and module.residual_connection:
            tails.append(module.to_out[0])
        elif isinstance(module, BasicTransformerBlock) and module not in inside:
            tails += [attention.to_out[0] for attention in (module.attn1, module.attn2) if attention is not None]
            tails.append(module.ff.net[2])
    for tail in tails:
        if tail is not None:
            for parameter in tail.parameters():
                nn.init.zeros_(parameter)


def set_attention_and_memory(network: Any, *, gradient_checkpointing: bool, xformers: bool) -> None:
    """Switch on gradient checkpointing and xformers' attention if the arguments say so, in place.

    Raises:
        ImportError, RuntimeError: xformers is not installed, or there is no GPU for it.
        ValueError: the network has no gradient checkpointing.

    """
    if gradient_checkpointing:
        # names in diffusers, in transformers, and in older versions of transformers
        names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next((getattr(network, name) for name in names if hasattr(network, name)), None)
        if enable is None or not getattr(network, "_supports_gradient_checkpointing", True):
            raise ValueError(f"loop.gradient_checkpointing: {type(network).__name__} has none; set it to false")
        enable()
    # networks of transformers have no such switch and need none: their sequences are short
    if xformers and hasattr(network, "enable_xformers_memory_efficient_attention"):
        if importlib.util.find_spec("xformers") is None:
            raise ImportError("loop.xformers: pip install xformers, or set it to false for the attention of torch")
        if not torch.cuda.is_available():
            raise RuntimeError("loop.xformers: needs a CUDA GPU, there is none; set it to false")
        network.enable_xformers_memory_efficient_attention()


def unreached(module: nn.Module, outputs: Iterable[Tensor]) -> list[str]:
    """Return the names of the trainable parameters of `module` that get no gradient from `outputs`.

    They are read from the autograd graph, without a backward pass; a gradient of zero counts as one. Such parameters
    cannot be trained by several processes: DDP fails in the step after one without their gradient.
    """
    nodes, left = set[Any](), [output.grad_fn for output in outputs]
    while left:
        node = left.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            left += [following for following, _ in node.next_functions]
    reached = {id(node.variable) for node in nodes if hasattr(node, "variable")}  # the leaves
    return [name for name, weight in module.named_parameters() if weight.requires_grad and id(weight) not in reached]


def freeze_unused(module: nn.Module, forward: Callable[[], Iterable[Tensor]]) -> list[str]:
    """Freeze, in place, the parameters of `module` that no output of `forward` depends on; return their names.

    Parts that `forward` does not call are not frozen: the next batch may call them (an expert, for example).
    """
    called = set[nn.Module]()
    hooks = [part.register_forward_hook(lambda part, *_: called.add(part)) for part in module.modules()]
    training = module.training
    module.eval()  # no dropout
    with torch.enable_grad():
        unused = unreached(module, forward())
    module.train(training)
    for hook in hooks:
        hook.remove()
    frozen = [name for name in unused if module.get_submodule(name.rpartition(".")[0]) in called]
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    return frozen


def without_float16(network: N) -> N:
    """Return a loaded network, with float32 weights if they were saved in float16: no processor computes with those."""
    return network.float() if next(network.parameters()).dtype == torch.float16 else network


def image_layers_hash(network: nn.Module) -> str | None:
    """Return a hash of the frozen layers of a network of clips, which are those of images; None if it has none."""
    frozen = {name for name, one in network.named_parameters() if not one.requires_grad}
    return weights_hash(network, frozen) if frozen and isinstance(network, VideoUNet | VideoAutoencoder) else None


def weights_hash(module: nn.Module, some: Collection[str] | None = None) -> str:
    """Return a hash of the weights, 32 hexadecimal digits, by their names, shapes, types and values.

    some: names of those that count; None: all.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        if some is not None and name not in some:
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def network_hash(network: nn.Module) -> str:
    """Return a hash of the weights and the config: equal hashes, equal outputs. Places and versions do not count."""
    said = _plain(_own_config(network))
    return hashlib.blake2b(f"{weights_hash(network)}{said}".encode(), digest_size=16).hexdigest()


def _own_config(network: nn.Module) -> dict[str, Any]:
    """Return what a config says other than its class's defaults, which later versions of a library add to."""
    config = getattr(network, "config", None)
    if isinstance(config, PreTrainedConfig):
        named = config.to_diff_dict()
        return {name: value for name, value in named.items() if name[0] != "_" and name not in NOT_COMPUTED}
    arguments = inspect.signature(type(network)).parameters
    values = {name: value for name, value in (config or {}).items() if name in arguments}
    return {name: value for name, value in values.items() if _plain(value) != _plain(arguments[name].default)}


def _plain(value: object) -> str:
    """Return a value as JSON, in which a tuple is a list."""
    return json.dumps(value, sort_keys=True, default=str)


NOT_COMPUTED = ("architectures", "dtype", "torch_dtype", "transformers_version")
"""Fields of a transformers config that say nothing about what is computed from the weights."""


def weights_sha256(network: nn.Module) -> str:
    """Return the SHA-256 of the weights, 64 hexadecimal digits, by names, shapes and values in float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
