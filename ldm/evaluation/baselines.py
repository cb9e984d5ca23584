"""What follows no caption, and must stand beside a number that is to say that a model does.

- the copier answers a caption with the image of the nearest training caption: what a look-up table gets;
- shuffled captions: the generated images, captions exchanged: what is left is not prompt following.
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

    Near is a large weighted Jaccard index of the two sets of lower-cased words ("medium-dark" is one word):
    the weight of the shared words over the weight of all words of both. The weight of a word is
    ``1 + log((1 + T) / (1 + d))``, `d` the number of training captions that have it: rare words say more. The
    first of equals is taken; a caption that shares no word with any gets index 0.
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
    """Return a permutation of 0..N-1 under which nothing keeps its own image, fixed by the seed.

    ``own_index[result[i]] != own_index[i]`` everywhere: no fixed point, even where captions share an image.
    Raises where more than half of the captions share one.
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
    """Return the captions in another order, fixed by the seed, in which nobody keeps theirs or one of the same words.

    Raises ValueError where more than half of them are the same.
    """
    number = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    order = derangement(np.array([number[caption] for caption in captions], np.int64), seed)
    return [captions[row] for row in order]


def other_values(values: Sequence[T], seed: int = 0) -> list[T]:
    """Return for each value another of those that occur, each as likely as the others, fixed by the seed.

    For values that repeat, as classes do, of which one may be most of them. Raises ValueError where all are the same.
    """
    distinct = list(dict.fromkeys(values))
    if len(distinct) < 2:
        raise ValueError(f"all {len(values)} values are the same; expected two that differ")
    number = {value: index for index, value in enumerate(distinct)}
    ahead = np.random.default_rng(seed).integers(1, len(distinct), len(values))
    return [distinct[(number[value] + int(step)) % len(distinct)] for value, step in zip(values, ahead, strict=True)]


def _words(caption: str) -> set[str]:
    return set(_WORD.findall(caption.lower()))
