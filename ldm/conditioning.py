"""What the denoiser is told: each conditioner knows how to encode, what its null is and how it is dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.config import ConditionersConfig
from ldm.models.text_encoder import build_text_encoder

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Conditions:
    """What conditions add to a call of the denoiser: input channels and keyword arguments."""

    channels: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def merge(conditions: Sequence[Conditions]) -> Conditions:
    """Return all conditions as one; raises ValueError if two set the same keyword."""
    kwargs: dict[str, Any] = {}
    for one in conditions:
        if both := kwargs.keys() & one.kwargs.keys():
            raise ValueError(f"two conditioners set the denoiser's {sorted(both)[0]!r}")
        kwargs |= one.kwargs
    return Conditions(tuple(channel for one in conditions for channel in one.channels), kwargs)


class ConditioningBatch(Protocol):
    """What conditioners read of a batch."""

    @property
    def captions(self) -> Sequence[str]:
        """Return the B captions."""


class Conditioner(Protocol):
    """A module that turns its part of a batch into conditions."""

    dropout: float
    """Share of samples that train with the null."""
    frozen: bool
    """Whether `inputs` already holds what a frozen network computed."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Return what it encodes with."""

    def inputs(self, batch: ConditioningBatch, dropped: Sequence[bool]) -> Inputs:
        """Return the tensors that `forward` takes, (B, ...), the null where `dropped`; no gradient."""

    def __call__(self, **inputs: Tensor) -> Conditions:
        """Return the conditions; runs inside the trained module's forward."""


class TextConditioner(nn.Module):
    """Captions as ``encoder_hidden_states``; the null is the caption ""."""

    def __init__(self, text_encoder: nn.Module, tokenizer: Any, *, train: bool, dropout: float):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"conditioners.text.dropout: got {dropout}; expected 0 <= dropout < 1")
        self.frozen = not train
        self.dropout = dropout
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.requires_grad_(train)
        if self.frozen:
            self.text_encoder.eval()
        self._embeds: dict[str, Tensor] = {}

    @property
    def networks(self) -> list[nn.Module]:
        """The text encoder."""
        return [self.text_encoder]

    def tokenize(self, captions: Sequence[str]) -> Inputs:
        """Return ``input_ids``, (B, max_length) int64, and ``attention_mask`` if the encoder was made for one.

        Exactly what the Stable Diffusion pipeline feeds its text encoder, padding included.
        """
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        inputs = {"input_ids": tokens.input_ids}
        if getattr(self.text_encoder.config, "use_attention_mask", None):
            inputs["attention_mask"] = tokens.attention_mask
        return inputs

    def inputs(self, batch: ConditioningBatch, dropped: Sequence[bool]) -> Inputs:
        """Return token ids, or prompt embeddings if the encoder is frozen."""
        captions = ["" if drop else caption for caption, drop in zip(batch.captions, dropped, strict=True)]
        return {"prompt_embeds": self.embed(captions)} if self.frozen else self.tokenize(captions)

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Tensor:
        """Return prompt embeddings (B, L, D) of the frozen encoder; each caption is encoded once and kept."""
        new = sorted({caption for caption in captions if caption not in self._embeds})
        if new:
            device = next(self.text_encoder.parameters()).device
            tokens = {name: tensor.to(device) for name, tensor in self.tokenize(new).items()}
            self._embeds |= zip(new, self.text_encoder(**tokens)[0].float().cpu(), strict=True)
        return torch.stack([self._embeds[caption] for caption in captions])

    def forward(self, **inputs: Tensor) -> Conditions:
        """Return the prompt embeddings, (B, L, D), as ``encoder_hidden_states``."""
        embeds = inputs["prompt_embeds"] if "prompt_embeds" in inputs else self.text_encoder(**inputs)[0]
        return Conditions(kwargs={"encoder_hidden_states": embeds})


def build_conditioners(config: ConditionersConfig, captions: Sequence[str]) -> dict[str, TextConditioner]:
    """Return the conditioners that `config` names; `captions` are those of the training split."""
    conditioners: dict[str, TextConditioner] = {}
    if config.text is not None:
        text_encoder, tokenizer = build_text_encoder(config.text, captions)
        conditioners["text"] = TextConditioner(
            text_encoder, tokenizer, train=config.text.train, dropout=config.text.dropout
        )
    return conditioners
