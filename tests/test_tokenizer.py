"""Tokenizers: the merges of the slow textbook algorithm in a fraction of its time, and every kind kept as JSON."""

import random
import time
from collections import Counter
from itertools import pairwise

import pytest
from transformers import AutoTokenizer, BertTokenizer, T5Tokenizer

from ldm.config.conditioners import TextConfig
from ldm.models.text_encoder import (
    build_text_encoder,
    learn_merges,
    tokenizer_from_json,
    tokenizer_hash,
    tokenizer_json,
    train_tokenizer,
)

from .table import table

CAPTIONS = ["men with bunny ears", "woman astronaut medium-dark skin tone", "keycap 3"]
ODD = [
    *CAPTIONS,
    "",
    " ",
    "日本 é e\u0301 😀 \x00 \r\n\t",
    "Z" * 50,
    "<|endoftext|> </s> [SEP]",
    "ab ba\u2028it's 007",
    "\ufeffß İ",
]


def textbook_merges(words, count):
    """The algorithm of Sennrich et al. 2016 as it is written: all pairs counted anew for each merge."""
    words, merges = dict(words), []
    while len(merges) < count:
        pairs = Counter()
        for symbols, occurrences in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += occurrences
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {merged(symbols, best): occurrences for symbols, occurrences in words.items()}
    return merges


def merged(symbols, pair):
    result = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return tuple(result)


def test_merges_are_those_of_the_textbook_in_whatever_order_words_come():
    draw = random.Random(0)
    for _ in range(150):
        letters = "abcdefgh"[: draw.randint(1, 8)]  # few letters: many ties, and pairs that overlap as in aaa
        spelled = ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(draw.randint(0, 30))]
        words = {(*word[:-1], word[-1] + "</w>"): draw.choice((1, 1, 1, 2, 30)) for word in spelled}
        shuffled = dict(draw.sample(list(words.items()), len(words)))
        for count in (0, 7, 1000):
            assert learn_merges(shuffled, count) == textbook_merges(words, count), words


def test_thousands_of_captions_take_seconds_with_and_without_spaces():
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlcu", k=draw.randint(4, 11))) for _ in range(8000)]
    chinese = [chr(0x4E00 + number) for number in range(1200)]
    captions = {
        "8,000 words": [" ".join(draw.choices(words, k=10)) for _ in range(8000)],
        "500 captions without spaces": ["".join(draw.choices(chinese, k=30)) for _ in range(500)],
        "one long word": ["".join(draw.choices("abc", k=20_000))],
    }
    for what, texts in captions.items():
        start = time.process_time()
        tokenizer = train_tokenizer(texts, TextConfig.vocab_size, 77)
        assert len(tokenizer) == TextConfig.vocab_size
        assert time.process_time() - start < 4, what  # 50 s, 70 s and 3 s where every merge counts all pairs


def test_every_string_has_tokens_and_none_is_unknown():
    tokenizer = train_tokenizer(CAPTIONS, 600, 24)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    for text in ("", "bunny", "日本 é 😀 \x00", "Z" * 5):
        ids = tokenizer(text).input_ids
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.tokenize("bunny ears") == ["bunny</w>", "ears</w>"]


def test_a_tokenizer_round_trips_through_its_folder(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 600, 24)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("woman with bunny ears").input_ids == tokenizer("woman with bunny ears").input_ids
    assert again.model_max_length == 24


def test_the_same_captions_always_give_the_same_tokenizer():
    captions = [f"{a}{b} {b}{a}" for a in "abcdefgh" for b in "abcdefgh"]  # every pair is a tie
    one, two = (train_tokenizer(order, 600, 24) for order in (captions, captions[::-1]))
    assert one.get_vocab() == two.get_vocab()
    assert one("ab ba").input_ids == two("ab ba").input_ids


def wordpiece():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ab", "##b", "a", "b", "##a", "men", "with", "日", "3"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=12)


def unigram():
    scores = {
        "<pad>": 0.0,
        "</s>": 0.0,
        "<unk>": -2.0,
        "▁": -2.0,
        "a": -3.0,
        "b": -3.1,
        "▁ab": -3.5,
        "e": -4.0,
        "日": -5.0,
    }
    return T5Tokenizer(vocab=list(scores.items()), extra_ids=2, model_max_length=12)


def padding_left():
    tokenizer = train_tokenizer(CAPTIONS, 600, 12)
    tokenizer.padding_side = "left"
    return tokenizer


KINDS = {
    "clip": lambda: train_tokenizer(CAPTIONS, 600, 12),
    "clip, left": padding_left,
    "clip, other captions": lambda: train_tokenizer(CAPTIONS[1:], 600, 12),
    "clip, longer": lambda: train_tokenizer(CAPTIONS, 600, 13),
    "wordpiece": wordpiece,
    "unigram": unigram,
}


def padded(tokenizer):
    return tokenizer(ODD, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)


@table("kind", KINDS)
def test_a_tokenizer_of_any_kind_comes_back_from_json_with_equal_ids(kind, tmp_path):
    tokenizer = KINDS[kind]()
    text, name = tokenizer_json(tokenizer), tokenizer_hash(tokenizer)
    whole = tokenizer(ODD, verbose=False).input_ids
    expected = padded(tokenizer)
    again = tokenizer_from_json(text)
    assert padded(again) == expected
    assert again(ODD, verbose=False).input_ids == whole
    assert type(again) is type(tokenizer)
    assert again.special_tokens_map == tokenizer.special_tokens_map
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_json(tokenizer) == text  # after calls that pad and truncate
    assert {tokenizer_hash(one) for one in (tokenizer, again, saved)} == {name}


def test_tokenizers_that_differ_have_different_hashes():
    assert len({tokenizer_hash(make()) for make in KINDS.values()}) == len(KINDS)


def test_files_of_a_tokenizer_stay_in_their_folder():
    with pytest.raises(ValueError, match="expected a plain name"):
        tokenizer_from_json('{"../tokenizer.json": "{}"}')


def test_a_given_tokenizer_takes_the_place_of_a_learned_and_of_a_pretrained_one(tmp_path):
    given = train_tokenizer(CAPTIONS, 530, 12)
    encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network, learned = build_text_encoder(TextConfig(encoder=encoder, max_length=12), ["other words"], given)
    assert learned is given
    assert network.config.vocab_size == len(given)
    network.save_pretrained(tmp_path / "text_encoder")
    train_tokenizer(["other words"], 530, 12).save_pretrained(tmp_path / "tokenizer")
    _, taken = build_text_encoder(TextConfig(pretrained=str(tmp_path), max_length=12), [], given)
    assert taken is given
