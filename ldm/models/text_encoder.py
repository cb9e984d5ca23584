"""Text encoders and their tokenizers: CLIP from scratch, a pretrained CLIP, or a BERT-like language model."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
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

from ldm.config.conditioners import TextConfig
from ldm.config.places import PLAIN_NAME, resolve
from ldm.errors import ConfigError, explained
from ldm.models.component import find_component
from ldm.models.foreign import own_code_refused, refuse_strange_shards
from ldm.models.network import built, refuse_unknown, without_float16
from ldm.models.quiet import HALF_A_CLIP, quietly
from ldm.terminal import progress_bar

BEGIN, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
WHOLE_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose byte-pair merges are learned from `captions`.

    The vocabulary has the layout of CLIP's: 256 bytes, the same 256 at the end of a word, the merges, begin, end. So
    every string can be tokenized without unknown tokens. The end token, which also pads, never has id 2, which
    transformers treats as a mark of old checkpoints. There are fewer than `vocab_size` entries if no pair is left.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = letters + [letter + WORD_END for letter in letters]
    if vocab_size < len(base) + 2:
        raise ConfigError(f"vocab_size {vocab_size}: at least {len(base) + 2} are needed, for every byte")
    learner = CLIPTokenizer(vocab={BEGIN: 0, END: 1}, merges=[]).backend_tokenizer
    words: Counter[str] = Counter()
    for caption in set(captions):
        pieces = learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(caption))
        words.update(piece for piece, _ in pieces)
    spelled = {(*word[:-1], word[-1] + WORD_END): occurrences for word, occurrences in words.items()}
    merges = learn_merges(spelled, vocab_size - len(base) - 2)
    tokens = dict.fromkeys(base + [left + right for left, right in merges] + [BEGIN, END])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def learn_merges(words: Mapping[tuple[str, ...], int], count: int) -> list[tuple[str, str]]:
    """Return up to `count` byte-pair merges (Sennrich et al. 2016); `words` maps symbols to their occurrences.

    The most frequent pair is merged first, and of equally frequent ones the first in alphabetical order. So the same
    captions always give the same tokenizer, on which trained weights depend. The trainer of `tokenizers` 0.23 breaks
    ties by numbers from a randomly seeded hash map: two calls may give two vocabularies. Even with a fixed order (the
    symbols as special tokens), its vocabulary is not that of older checkpoints.

    A merge visits only the words that contain its pair. The heap holds every count that a pair ever had; outdated
    counts are skipped.
    """
    spellings, occurrences = [list(word) for word in words], list(words.values())
    counts: Counter[tuple[str, str]] = Counter()
    occurs_in: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for number, symbols in enumerate(spellings):
        for pair in pairwise(symbols):
            counts[pair] += occurrences[number]
            occurs_in[pair].add(number)
    heap = [(-occurring, pair) for pair, occurring in counts.items()]
    heapify(heap)
    merges: list[tuple[str, str]] = []
    with progress_bar(count, "learning the tokenizer", "merge") as bar:
        while heap and len(merges) < count:
            occurring, best = heappop(heap)
            if -occurring != counts[best]:
                continue
            merges.append(best)
            bar.update()
            changed: Counter[tuple[str, str]] = Counter()
            for number in occurs_in.pop(best):
                lost, gained = _merge(spellings[number], best)
                for pair in lost:
                    changed[pair] -= occurrences[number]
                for pair in gained:
                    changed[pair] += occurrences[number]
                    occurs_in[pair].add(number)
            for pair, change in changed.items():
                counts[pair] += change
                if change and counts[pair]:
                    heappush(heap, (-counts[pair], pair))
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Merge `pair` wherever it occurs in `symbols`, in place; return the pairs that vanish and those that appear."""
    lost: list[tuple[str, str]] = []
    gained: list[tuple[str, str]] = []
    left, right = pair
    merged: list[str] = []
    done = place = 0
    with suppress(ValueError):  # `left` does not occur any more
        while True:
            place = symbols.index(left, place, -1)
            if symbols[place + 1] != right:
                place += 1
                continue
            merged += symbols[done:place]
            before, after = merged[-1:], symbols[place + 2 : place + 3]
            lost += pairwise([*before, left, right, *after])
            gained += pairwise([*before, left + right, *after])
            merged.append(left + right)
            done = place = place + 2
    symbols[:] = merged + symbols[done:]
    return lost, gained


def tokenizer_json(tokenizer: Any) -> str:
    """Return a tokenizer as JSON, ``{file name: text}`` of its saved files; `tokenizer_from_json` reads it.

    The padding and truncation of earlier calls are not in it.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes().decode() for path in sorted(Path(folder).iterdir())}
    if WHOLE_FILE in files:
        files[WHOLE_FILE] = json.dumps(json.loads(files[WHOLE_FILE]) | {"padding": None, "truncation": None})
    not_always_saved = ("padding_side", "truncation_side", "model_max_length")
    settings = {name: getattr(tokenizer, name) for name in not_always_saved}
    files[CONFIG_FILE] = json.dumps(json.loads(files[CONFIG_FILE]) | settings)
    return json.dumps(files)


def tokenizer_from_json(text: str) -> Any:
    """Return the tokenizer that `tokenizer_json` wrote: it gives the same ids, and cuts captions at the same length.

    Raises:
        ValueError: the JSON names a file in another folder, or the tokenizer would run its own code.

    """
    files = json.loads(text)
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            if not PLAIN_NAME.fullmatch(name):
                raise ValueError(f"tokenizer: a file of it is called {name!r}; expected a plain name")
            Path(folder, name).write_bytes(content.encode())
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's ids, 32 hexadecimal digits, padding and truncation included.

    Compare hashes of one process only: another version of transformers may save the same tokenizer differently.
    """
    files = json.loads(tokenizer_json(tokenizer))
    files.pop(CONFIG_FILE)
    settings = [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length]
    special = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items()}
    whole = json.dumps([files, settings, special], sort_keys=True)
    return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


def build_text_encoder(
    config: TextConfig, captions: Iterable[str], tokenizer: Any | None = None
) -> tuple[nn.Module, Any]:
    """Return ``(text_encoder, tokenizer)``, from scratch or pretrained as `config` says.

    From scratch, the tokenizer is learned from `captions`, which must be those of the training split only. A given
    `tokenizer` takes the place of the learned or pretrained one.
    """
    if config.pretrained is not None:
        outputs = config.keywords.values()
        return load_text_encoder(config.pretrained, config.max_length, tokenizer, outputs, config.dtype)
    if tokenizer is None:
        tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length)
    keys = dict(config.encoder)
    name = keys.pop("_class_name", "CLIPTextModel")
    where = "conditioners.text.encoder"
    if name != "CLIPTextModel":
        raise ConfigError(f"{where}._class_name: got {name!r}; from scratch, expected CLIPTextModel")
    ours = token_settings(tokenizer, config.max_length)
    allowed = set(inspect.signature(CLIPTextConfig).parameters) - ours.keys()
    refuse_unknown(keys, allowed, where, "of CLIPTextConfig, or one that the tokenizer decides")
    return built(lambda: CLIPTextModel(CLIPTextConfig(**keys, **ours)), where, name), tokenizer


def token_settings(tokenizer: Any, max_length: int) -> dict[str, int]:
    """Return the keys of a ``CLIPTextConfig`` that a tokenizer of at most `max_length` tokens decides."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@quietly(*HALF_A_CLIP)
def load_text_encoder(
    pretrained: str,
    max_length: int,
    tokenizer: Any | None = None,
    outputs: Collection[str] = ("prompt_embeds",),
    dtype: str | None = None,
) -> tuple[nn.Module, Any]:
    """Return ``(text_encoder, tokenizer)`` from a folder, the Hub, or ``package:NAME/FOLDER`` of an installed package.

    On the Hub, ``user/name@revision`` is a commit, branch or tag. Code that comes with a model is never run. A pipeline
    has both as its components ``text_encoder`` and ``tokenizer``. A given `tokenizer` takes the place of the found one.

    A CLIP is loaded with its projection only if `outputs`, those of `TextConfig.keywords`, contain
    ``pooled_prompt_embeds``. With the projection, these would be the encoder's first output, which pipelines take for
    ``prompt_embeds``. All other encoders get ``use_attention_mask`` in their config: the Stable Diffusion pipeline
    then passes them the mask that they need. dtype: as in `TextConfig`.
    """
    where = "conditioners.text.pretrained"
    with explained(where), own_code_refused(where, pretrained):
        place, keywords = find_component(resolve(pretrained), ("text_encoder",))
        # without it, transformers asks at the terminal, and "y" runs the code
        options = {"trust_remote_code": False, **keywords}
        refuse_strange_shards(Path(place, keywords.get("subfolder", "")))
        found = AutoConfig.from_pretrained(place, **options)
        with_projection = {"CLIPTextModelWithProjection", "CLIPModel"} & {*(found.architectures or ())}
        projected = "pooled_prompt_embeds" in outputs and with_projection
        clip = CLIPTextModelWithProjection if projected else CLIPTextModel
        kind = clip if found.model_type.startswith("clip") else AutoModelForTextEncoding
        weights = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        encoder = kind.from_pretrained(place, use_safetensors=True, **weights, **options)
        if tokenizer is None:
            tokenizer = load_tokenizer(pretrained)
    longest = getattr(encoder.config, "max_position_embeddings", max_length)
    if max_length > longest:
        raise ConfigError(
            f"conditioners.text.max_length: got {max_length}; {pretrained} reads at most {longest} tokens"
        )
    tokenizer.model_max_length = max_length
    if kind is AutoModelForTextEncoding:
        encoder.config.use_attention_mask = True
    return without_float16(encoder), tokenizer


def load_tokenizer(pretrained: str) -> Any:
    """Return the tokenizer of a pipeline or of its own folder, named as in `load_text_encoder`."""
    place, keywords = find_component(resolve(pretrained), ("tokenizer",))
    return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **keywords)
