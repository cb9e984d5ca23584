"""Text encoders and their tokenizers: CLIP from scratch, a pretrained CLIP, or a BERT-like language model."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ldm.config_check import ConfigError, explained
from ldm.config_conditioners import TextConfig
from ldm.models.foreign import own_code_refused, refuse_strange_shards
from ldm.models.network import built, refuse_unknown
from ldm.places import pinned, resolve

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
    words: Counter[tuple[str, ...]] = Counter()
    for caption in sorted(set(captions)):
        pieces = learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(caption))
        words.update((*piece[:-1], piece[-1] + WORD_END) for piece, _ in pieces)
    merges = learn_merges(words, vocab_size - len(base) - 2)
    tokens = dict.fromkeys(base + [left + right for left, right in merges] + [BEGIN, END])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def learn_merges(words: Mapping[tuple[str, ...], int], count: int) -> list[tuple[str, str]]:
    """Return up to `count` byte-pair merges of `words`, symbols with how often they occur (Sennrich et al. 2016).

    The most frequent pair first, the first in alphabetical order of equals: the same captions always give the same
    tokenizer, which a resumed run needs (the trainer of `tokenizers` breaks ties differently in every call).
    """
    left_words, merges = dict(words), list[tuple[str, str]]()
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, occurrences in left_words.items():
            for pair in pairwise(symbols):
                pairs[pair] += occurrences
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        left_words = {_merged(symbols, best): occurrences for symbols, occurrences in left_words.items()}
    return merges


def _merged(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    if pair[0] not in symbols:
        return symbols
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return tuple(result)


def build_text_encoder(config: TextConfig, captions: Iterable[str]) -> tuple[nn.Module, Any]:
    """Return ``(text_encoder, tokenizer)``, from scratch or pretrained as `config` says.

    From scratch the tokenizer is learned from `captions`, which must be those of the training split only.
    """
    if config.pretrained is not None:
        return load_text_encoder(config.pretrained, config.max_length)
    tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length)
    keys = dict(config.encoder)
    name = keys.pop("_class_name", "CLIPTextModel")
    where = "conditioners.text.encoder"
    if name != "CLIPTextModel":
        raise ConfigError(f"{where}._class_name: got {name!r}; from scratch, expected CLIPTextModel")
    ours = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    allowed = set(inspect.signature(CLIPTextConfig).parameters) - ours.keys()
    refuse_unknown(keys, allowed, where, "of CLIPTextConfig, or one that the tokenizer decides")
    return built(lambda: CLIPTextModel(CLIPTextConfig(**keys, **ours)), where, name), tokenizer


def load_text_encoder(pretrained: str, max_length: int) -> tuple[nn.Module, Any]:
    """Return ``(text_encoder, tokenizer)`` from a folder, the Hub, or ``package:NAME/FOLDER`` of an installed package.

    On the Hub, ``user/name@revision`` is a commit, branch or tag. Code that comes with a model is never run.

    A folder with ``text_encoder`` and ``tokenizer`` in it (a pipeline's) is read from there. All encoders but CLIP's
    get ``use_attention_mask`` in their config: it makes the Stable Diffusion pipeline pass them the mask they need.
    """
    name, revision = pinned(pretrained)
    encoder_folder = tokenizer_folder = resolve(name)
    if (Path(encoder_folder) / "text_encoder").is_dir():
        encoder_folder, tokenizer_folder = f"{encoder_folder}/text_encoder", f"{tokenizer_folder}/tokenizer"
    where = "conditioners.text.pretrained"
    options = {"trust_remote_code": False, **revision}  # not given: transformers asks at the terminal, and y runs it
    with explained(where), own_code_refused(where, pretrained):
        refuse_strange_shards(encoder_folder)
        found = AutoConfig.from_pretrained(encoder_folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, **options)
        clip = CLIPTextModelWithProjection if _projects(found) else CLIPTextModel
        kind = clip if found.model_type.startswith("clip") else AutoModelForTextEncoding
        encoder = kind.from_pretrained(encoder_folder, use_safetensors=True, **options)
    longest = getattr(encoder.config, "max_position_embeddings", max_length)
    if max_length > longest:
        raise ValueError(f"conditioners.text.max_length: got {max_length}; {pretrained} reads at most {longest} tokens")
    tokenizer.model_max_length = max_length
    if kind is AutoModelForTextEncoding:
        encoder.config.use_attention_mask = True
    return encoder, tokenizer


def _projects(config: Any) -> bool:
    return "CLIPTextModelWithProjection" in (config.architectures or ())
