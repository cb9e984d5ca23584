"""Baselines that ignore the caption: a model has to be better than these to show that it follows its prompts.

- the copier: it returns the training image whose caption is nearest, as a look-up table would;
- shuffled captions: the generated images are compared with the captions of others.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from .measure import Indices

T = TypeVar("T", bound=Hashable)

_WORD = re.compile(r"\w+(?:[-']\w+)*")


def nearest_training_captions(captions: Sequence[str], training_captions: Sequence[str]) -> Indices:
    """Return for each caption the index of the nearest training caption, (N,) in [0, T - 1].

    Captions are compared by the weighted Jaccard index of their sets of lower-cased words ("medium-dark" is one
    word): the weight of the shared words over the weight of all words of both. A word that `d` of the T training
    captions have weighs ``1 + log((1 + T) / (1 + d))``: rare words count more. Of several nearest captions the first
    is taken. A caption that shares no word with any of them gets index 0.
    """
    if not training_captions:
        raise ValueError("training_captions is empty: there is nothing to copy from")
    having = defaultdict(list)  # word -> the training captions that have it
    for index, caption in enumerate(training_captions):
        for word in _words(caption):
            having[word].append(index)
    postings = {word: np.array(indices) for word, indices in having.items()}

    def weight(word: str) -> float:
        return 1 + math.log((1 + len(training_captions)) / (1 + len(having.get(word, ()))))

    # fsum and rounding: equals stay equal whatever the order of the words.
    training_weight = np.array([math.fsum(map(weight, _words(caption))) for caption in training_captions])
    nearest = np.zeros(len(captions), np.int64)
    for row, caption in enumerate(captions):
        words = _words(caption)
        shared = np.zeros(len(training_captions))
        for word in sorted(words & postings.keys()):
            shared[postings[word]] += weight(word)
        union = math.fsum(map(weight, words)) + training_weight - shared
        nearest[row] = np.argmax(np.round(shared / np.maximum(union, 1), 12))  # a word weighs at least 1
    return nearest


def derangement(own_index: Indices, seed: int = 0) -> Indices:
    """Return a permutation of the N captions that gives each the image of another, (N,); fixed by the seed.

    ``own_index[result[i]] != own_index[i]`` for every i, also where several captions share an image. Raises
    ValueError where more than half of the captions share one.
    """
    _, group = np.unique(own_index, return_inverse=True)
    sizes = np.bincount(group)
    widest = int(sizes.max(initial=0))
    if widest * 2 > len(group) or not widest:
        raise ValueError(f"{widest} of {len(group)} captions have the same image; at most half may")
    shuffled = np.random.default_rng(seed).permutation(len(sizes))[group]
    order = np.argsort(shuffled, kind="stable")  # captions of one image side by side
    result = np.empty(len(group), np.int64)
    result[order] = np.roll(order, widest)
    return result


def exchanged_captions(captions: Sequence[T], seed: int = 0) -> list[T]:
    """Return the captions in another order, fixed by the seed; no place keeps its caption or gets an equal one.

    Raises ValueError where more than half of the captions are the same.
    """
    number = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    order = derangement(np.array([number[caption] for caption in captions], np.int64), seed)
    return [captions[row] for row in order]


def other_values(values: Sequence[T], seed: int = 0) -> list[T]:
    """Return for each value a different one of those that occur, all equally likely; fixed by the seed.

    For classes, where one value may be most of them. Raises ValueError where all are the same.
    """
    distinct = list(dict.fromkeys(values))
    if len(distinct) < 2:
        raise ValueError(f"all {len(values)} values are the same; expected two that differ")
    number = {value: index for index, value in enumerate(distinct)}
    ahead = np.random.default_rng(seed).integers(1, len(distinct), len(values))
    return [distinct[(number[value] + int(step)) % len(distinct)] for value, step in zip(values, ahead, strict=True)]


def _words(caption: str) -> set[str]:
    return set(_WORD.findall(caption.lower()))
