"""The encoding of prompts to embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

from .inputs import logger


def encode(
    name: str,
    prompts: list[str],
    tokenizer: Any,
    text_encoder: Any,
    length: int,
    device: torch.device,
    zero_padding: bool = False,
    clip_skip: int | None = None,
) -> torch.Tensor:
    """Return the embeddings of `prompts`, padded or cut to `length` tokens: (B, length, D), on `device`.

    They are the encoder's first output. The encoder gets the attention mask if its config has `use_attention_mask`, as
    in `StableDiffusionPipeline`. If a prompt is cut, one warning gives the number of its tokens. name: the argument's,
    for the warning and errors. zero_padding: embeddings of padding are set to zero. clip_skip: as in `hidden_states`.
    ValueError if the encoder cannot read `length` tokens, or if the tokenizer needs more than that for "".
    """
    tokens = tokenized(name, prompts, tokenizer, text_encoder, length)
    mask = tokens.attention_mask.to(device) if getattr(text_encoder.config, "use_attention_mask", False) else None
    embeds = hidden_states(text_encoder, tokens.input_ids.to(device), mask, clip_skip)
    return embeds * tokens.attention_mask[..., None].to(embeds) if zero_padding else embeds


def tokenized(name: str, prompts: list[str], tokenizer: Any, text_encoder: Any, length: int) -> Any:
    """Return the tokens of `prompts`, padded or cut to `length`, with a warning if one is cut; errors as `encode`."""
    readable = getattr(text_encoder.config, "max_position_embeddings", length)
    if length > readable:
        raise ValueError(
            f"{name}: the text encoder reads {readable} tokens, not {length}: set pipe.tokenizer.model_max_length, or "
            "give prompt_embeds, and negative_prompt_embeds of their length"
        )
    longest = max(len(ids) for ids in tokenizer(prompts, verbose=False).input_ids)
    if longest > length:
        logger.warning("%s: %d tokens, of which the text encoder reads %d; the rest is cut", name, longest, length)
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    if tokens.input_ids.shape[1] != length:  # more than `length`: begin and end are never cut
        raise ValueError(
            f"{name}: {tokens.input_ids.shape[1]} tokens at least, but prompt_embeds have {length}; give "
            f"{name}_embeds too, or longer ones"
        )
    return tokens


def hidden_states(
    text_encoder: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, clip_skip: int | None
) -> torch.Tensor:
    """Return the first output of a text encoder for tokens (B, L): (B, L, D).

    clip_skip: number of last layers to leave out; the final layer norm is applied all the same. ValueError if the
    encoder has no such norm, or fewer layers.
    """
    if clip_skip is None:
        embeds: torch.Tensor = text_encoder(input_ids, attention_mask=attention_mask)[0]
        return embeds
    # in transformers 5 the norm is in the text encoder itself, in older versions one level deeper
    norm = getattr(getattr(text_encoder, "text_model", text_encoder), "final_layer_norm", None)
    if norm is None:
        name = type(text_encoder).__name__
        raise ValueError(f"clip_skip: {name} has no final_layer_norm, as CLIP's has; leave it out")
    layers = text_encoder.config.num_hidden_layers
    if clip_skip > layers:
        raise ValueError(f"clip_skip: got {clip_skip}; the text encoder has {layers} layers")
    states = text_encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
    embeds = norm(states[-1 - clip_skip])
    return embeds


@contextmanager
def lora_scaled(text_encoder: Any, scale: float | None) -> Iterator[None]:
    """Scale the LoRA layers of a text encoder inside the context; without peft there are none."""
    given = scale is not None and text_encoder is not None and USE_PEFT_BACKEND
    if given:
        scale_lora_layers(text_encoder, scale)
    try:
        yield
    finally:
        if given:
            unscale_lora_layers(text_encoder, scale)
