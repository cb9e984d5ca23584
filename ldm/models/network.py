"""Networks of diffusers, built from the keys of their own ``config.json`` or loaded from a folder or the Hub."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import PriorTransformer
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ldm.models.foreign import refuse_strange_shards
from ldm.places import pinned

ALLOWED = (
    "AutoencoderKL",
    "VQModel",
    "UNet2DModel",
    "UNet2DConditionModel",
    "PriorTransformer",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
)
LAST_LAYERS = ("conv_out", "proj_out", "proj_out_2", "proj_to_clip_embeddings")
"""What those that denoise call theirs."""


def build_network(network: dict[str, Any], where: str) -> nn.Module:
    """Return the network that `network` describes, with random weights, or the one ``pretrained`` names.

    `network` holds ``_class_name`` and arguments of that class's ``__init__``; or ``pretrained`` (folder or Hub name,
    ``user/name@revision`` too), optionally with ``revision`` and ``subfolder``, whose own config names the class.
    `where` is the config path that errors name. Raises ValueError.
    """
    keys = dict(network)
    name = keys.pop("_class_name", None)
    if "pretrained" in keys:
        keys["pretrained"], revision = pinned(str(keys["pretrained"]))
        if revision and "revision" in keys:
            raise ValueError(f"{where}.revision: given twice; leave it out, or the @ in {where}.pretrained")
        keys |= revision
    if name is None and "pretrained" in keys:
        place = {key: keys[key] for key in ("revision", "subfolder") if key in keys}
        name = diffusers.UNet2DModel.load_config(keys["pretrained"], **place).get("_class_name")
    if name not in ALLOWED:
        raise ValueError(f"{where}._class_name: got {name!r}; choose from {', '.join(ALLOWED)}")
    kind = getattr(diffusers, name)
    if "pretrained" in keys:
        folder = keys.pop("pretrained")
        _refuse_unknown(keys, {"revision", "subfolder"}, where, "beside 'pretrained'")
        refuse_strange_shards(Path(folder, keys.get("subfolder") or ""))
        # low_cpu_mem_usage would leave parameters that the folder lacks on the meta device
        loaded: nn.Module = kind.from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=True, **keys)
        return loaded
    allowed = set(inspect.signature(kind.__init__).parameters) - {"self"}
    _refuse_unknown(keys, allowed, where, f"of {name}")
    try:
        network_: nn.Module = kind(**keys)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {name} refuses these values: {error}") from error
    return network_


def _refuse_unknown(keys: dict[str, Any], allowed: set[str], where: str, what: str) -> None:
    for key in keys:
        if key not in allowed:
            close = difflib.get_close_matches(key, sorted(allowed), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}.{key}: no such field {what}{hint}")


def prepare_denoiser(denoiser: Any, *, fresh: bool) -> None:
    """Make a network of diffusers ready to be trained here, in place.

    Statistics of an embedding are no parameters to train; what is dropped is the conditioners' affair and not the
    label embedding's too. A `fresh` one, with random weights, gets `zero_tails` and statistics that change nothing.
    """
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    if isinstance(denoiser, PriorTransformer):
        denoiser.clip_mean.requires_grad_(False)
        denoiser.clip_std.requires_grad_(False)
        if fresh:  # they are zero, and so would be every embedding
            nn.init.ones_(denoiser.clip_std)
    if fresh:
        zero_tails(denoiser)


def keep_statistics(denoiser: Any, mean: Tensor, std: Tensor) -> None:
    """Write the mean and std of embeddings, (D,), where the denoiser's pipeline looks for them, in place."""
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
    2021; diffusers zeroes nothing), so that the first loss is the variance of the target and not that plus noise.
    """
    tails = [getattr(denoiser, name, None) for name in LAST_LAYERS]
    whole = [module for module in denoiser.modules() if isinstance(module, Transformer2DModel)]
    inside = {block for module in whole for block in module.modules()}  # one branch, whatever it is made of
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
    """Switch gradient checkpointing and xformers' attention on where asked for, in place.

    Raises:
        ImportError, RuntimeError: xformers is not installed, or there is no GPU for it.
        ValueError: the network has no gradient checkpointing.

    """
    if gradient_checkpointing:
        # of diffusers, of transformers, of transformers before it changed the name
        names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next((getattr(network, name) for name in names if hasattr(network, name)), None)
        if enable is None:
            raise ValueError(f"loop.gradient_checkpointing: {type(network).__name__} has none; set it to false")
        enable()
    # networks of transformers have no such switch, and need none: their attention is short
    if xformers and hasattr(network, "enable_xformers_memory_efficient_attention"):
        if importlib.util.find_spec("xformers") is None:
            raise ImportError("loop.xformers: pip install xformers, or set it to false for the attention of torch")
        if not torch.cuda.is_available():
            raise RuntimeError("loop.xformers: needs a CUDA GPU, there is none; set it to false")
        network.enable_xformers_memory_efficient_attention()


def weights_hash(module: nn.Module) -> str:
    """Return 32 hexadecimal digits that name the weights: equal names and values, equal hash."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
