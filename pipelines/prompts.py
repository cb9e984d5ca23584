"""Prompts to embeddings."""

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)


def encode(
    name: str,
    prompts: list[str],
    tokenizer: Any,
    text_encoder: Any,
    length: int,
    device: torch.device,
    zero_padding: bool = False,
) -> torch.Tensor:
    """Return the embeddings of `prompts`, padded or cut to `length` tokens: (B, length, D), on `device`.

    They are the encoder's first output; the encoder is given the attention mask if its config has
    `use_attention_mask`, as in `StableDiffusionPipeline`. If any prompt is cut, one warning counts its tokens; `name`
    stands in it. zero_padding: those of padding are zeros. ValueError if the encoder cannot read `length` tokens, or
    the tokenizer makes more of "".
    """
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
    if tokens.input_ids.shape[1] != length:  # begin and end are never cut
        raise ValueError(
            f"{name}: {tokens.input_ids.shape[1]} tokens at least, and prompt_embeds have {length}; give "
            f"{name}_embeds too, or longer ones"
        )
    mask = tokens.attention_mask.to(device) if getattr(text_encoder.config, "use_attention_mask", False) else None
    embeds: torch.Tensor = text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
    return embeds * tokens.attention_mask[..., None].to(embeds) if zero_padding else embeds
