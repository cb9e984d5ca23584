"""Captions, as the embeddings of a text encoder that is trained along or frozen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioners.conditioning import ConditioningBatch, Conditions, EncodedData, Inputs, checked_share
from ldm.models.network import freeze_unused, network_hash

log = logging.getLogger(__name__)

KEYWORDS = {"encoder_hidden_states": "prompt_embeds"}
"""The conditioning of Stable Diffusion's U-Net."""


class TextConditioner(nn.Module):
    """Prompt embeddings of captions; the null is the caption ""."""

    reads_pixels = False
    asks: str | None = "prompt"
    given_size: int | None = None

    def __init__(
        self,
        text_encoder: nn.Module,
        tokenizer: Any,
        *,
        train: bool,
        dropout: float,
        keywords: Mapping[str, str] | None = None,
    ):
        """Set each of the denoiser's `keywords` to the output it names; see `TextConfig.keywords`.

        Of a trained encoder, what no keyword uses (BERT's pooler) is frozen. ValueError if a keyword names an output
        that it does not have.
        """
        super().__init__()
        self.frozen = not train
        self.dropout = checked_share("conditioners.text", dropout)
        self.keywords = dict(keywords or KEYWORDS)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.requires_grad_(train)
        if self.frozen:
            self.text_encoder.eval()
        else:
            tokens = torch.zeros(1, 2, dtype=torch.int64)
            unused = freeze_unused(text_encoder, lambda: self.encode(tokens, torch.ones_like(tokens)).values())
            if unused:
                log.info("%s: no keyword uses %s: frozen", type(text_encoder).__name__, ", ".join(unused))
        self._encoded: dict[str, Inputs] = {}
        self._remembered: Mapping[str, Inputs] = {}

    @property
    def networks(self) -> list[nn.Module]:
        """The text encoder."""
        return [self.text_encoder]

    def tokenize(self, captions: Sequence[str]) -> Inputs:
        """Return ``input_ids``, (B, max_length) int64, and ``attention_mask`` if it is used.

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
        if self._reads_mask or "attention_mask" in self.keywords.values():
            inputs["attention_mask"] = tokens.attention_mask
        return inputs

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Inputs:
        """Return those outputs that `keywords` name.

        ``prompt_embeds``: last hidden states, (B, L, D). ``pooled_prompt_embeds``: (B, D), projected if the encoder has
        a projection. ``attention_mask``: (B, L), 1 for tokens, 0 for padding.
        """
        passed = {"attention_mask": attention_mask} if self._reads_mask else {}
        output = self.text_encoder(input_ids, **passed)
        pooled = output.get("text_embeds", output.get("pooler_output"))
        found = {
            "prompt_embeds": output.last_hidden_state,
            "pooled_prompt_embeds": pooled,
            "attention_mask": attention_mask,
        }
        wanted = {name: found[name] for name in dict.fromkeys(self.keywords.values())}
        if missing := [name for name, tensor in wanted.items() if tensor is None]:
            kind = type(self.text_encoder).__name__
            raise ValueError(f"conditioners.text.keywords: {kind} has no {missing[0]}; leave it out")
        return wanted

    def inputs(
        self, batch: ConditioningBatch, x0: Tensor, dropped: Sequence[bool], draws: Sequence[torch.Generator]
    ) -> Inputs:
        """Return token ids, or what `encode` makes of them if the encoder is frozen."""
        captions = ["" if drop else caption for caption, drop in zip(batch.captions, dropped, strict=True)]
        return self.embed(captions) if self.frozen else self.tokenize(captions)

    def embed(self, captions: Sequence[str]) -> Inputs:
        """Return the frozen encoder's outputs for `captions`, on the CPU; each caption is encoded once and kept."""
        new = sorted({one for one in captions if one not in self._remembered and one not in self._encoded})
        if new:
            encoded = self.encode_captions(new)
            for number, caption in enumerate(new):
                self._encoded[caption] = {name: tensor[number] for name, tensor in encoded.items()}
        rows = [(self._remembered if caption in self._remembered else self._encoded)[caption] for caption in captions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Inputs:
        """Return what `encode` makes of `captions`, on the CPU, float32 but for the mask."""
        device = next(self.text_encoder.parameters()).device
        encoded = self.encode(**{name: tensor.to(device) for name, tensor in self.tokenize(captions).items()})
        return {name: (t.float() if t.is_floating_point() else t).cpu() for name, t in encoded.items()}

    def remember(self, data: EncodedData) -> None:
        """Look up the captions of `data` if the encoder is frozen."""
        if self.frozen:
            self._remembered = data.encoded_captions(self.key, self.encode_captions)

    def key(self, captions: Sequence[str]) -> str:
        """Return a name for what `encode_captions` makes of `captions`: equal names, equal outputs."""
        digest = blake2b(digest_size=16)
        for _, tensor in sorted(self.tokenize(captions).items()):
            digest.update(tensor.numpy().tobytes())
        return "-".join([network_hash(self.text_encoder), digest.hexdigest(), *sorted(set(self.keywords.values()))])

    def forward(self, **inputs: Tensor) -> Conditions:
        """Return the outputs that `keywords` name."""
        outputs = inputs if self.frozen else self.encode(**inputs)
        return Conditions(kwargs={keyword: outputs[name] for keyword, name in self.keywords.items()})

    @property
    def _reads_mask(self) -> bool:
        return bool(getattr(self.text_encoder.config, "use_attention_mask", False))
