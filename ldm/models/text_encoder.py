"""Text encoders and their tokenizers: CLIP from scratch, a pretrained CLIP, or a BERT-like language model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.config import TextConfig

BEGIN, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose byte-pair merges are learned from `captions`.

    The vocabulary is laid out as CLIP's: 256 bytes, the same at the end of a word, the merges, begin, end. So every
    string has a tokenization without unknown tokens, and the end token, which also pads, never has id 2 (which
    transformers treats as a mark of old checkpoints). It has fewer than `vocab_size` entries if no pair is left.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = letters + [letter + WORD_END for letter in letters]
    if vocab_size < len(base) + 2:
        raise ValueError(f"vocab_size {vocab_size}: at least {len(base) + 2} are needed, for every byte")
    learner = CLIPTokenizer(vocab={BEGIN: 0, END: 1}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=letters, end_of_word_suffix=WORD_END, show_progress=False
    )
    learner.train_from_iterator(sorted(set(captions)), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][: vocab_size - len(base) - 2]
    tokens = dict.fromkeys(base + [left + right for left, right in merges] + [BEGIN, END])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def build_text_encoder(config: TextConfig, captions: Iterable[str]) -> tuple[nn.Module, Any]:
    """Return ``(text_encoder, tokenizer)``, from scratch or pretrained as `config` says.

    From scratch the tokenizer is learned from `captions`, which must be those of the training split only.
    """
    if config.pretrained is not None:
        return load_text_encoder(config.pretrained, config.max_length)
    tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length)
    keys = dict(config.encoder)
    name = keys.pop("_class_name", "CLIPTextModel")
    if name != "CLIPTextModel":
        raise ValueError(f"conditioners.text.encoder._class_name: got {name!r}; from scratch, expected CLIPTextModel")
    if unknown := sorted(set(keys) - set(inspect.signature(CLIPTextConfig).parameters)):
        raise ValueError(f"conditioners.text.encoder.{unknown[0]}: no such field of CLIPTextConfig")
    encoder = CLIPTextModel(
        CLIPTextConfig(
            **keys,
            vocab_size=len(tokenizer),
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return encoder, tokenizer


def load_text_encoder(pretrained: str, max_length: int) -> tuple[nn.Module, Any]:
    """Return ``(text_encoder, tokenizer)`` from a folder, the Hub, or ``package:NAME/FOLDER`` of an installed package.

    A folder with ``text_encoder`` and ``tokenizer`` in it (a pipeline's) is read from there. BERT-like encoders get
    ``use_attention_mask`` in their config, which makes the Stable Diffusion pipeline pass them the mask they need.
    """
    encoder_folder = tokenizer_folder = resolve(pretrained)
    if (Path(encoder_folder) / "text_encoder").is_dir():
        encoder_folder, tokenizer_folder = f"{encoder_folder}/text_encoder", f"{tokenizer_folder}/tokenizer"
    kind = CLIPTextModel if AutoConfig.from_pretrained(encoder_folder).model_type.startswith("clip") else AutoModel
    encoder = kind.from_pretrained(encoder_folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    longest = getattr(encoder.config, "max_position_embeddings", max_length)
    if max_length > longest:
        raise ValueError(f"conditioners.text.max_length: got {max_length}; {pretrained} reads at most {longest} tokens")
    tokenizer.model_max_length = max_length
    if kind is AutoModel:
        encoder.config.use_attention_mask = True
    return encoder, tokenizer


def resolve(pretrained: str) -> str:
    """Return the folder that ``package:NAME/FOLDER`` names; any other name unchanged."""
    if not pretrained.startswith("package:"):
        return pretrained
    package, _, folder = pretrained.removeprefix("package:").partition("/")
    return str(resources.files(package) / folder)
