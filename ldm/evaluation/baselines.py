"""What must stand beside a retrieval number: two floors and a ceiling.

- the copier answers a caption with the picture of the nearest training caption: what a look-up table gets;
- shuffled captions: the generated pictures, captions exchanged: what is left is not prompt following;
- the ceiling: the true pictures through the autoencoder: what its latents can carry.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from .measure import Indices
from .retrieval import Images, RetrievalReport, report, retrieval_ranks

Reconstruct = Callable[[Images], Images]
"""Pictures through an autoencoder and back, all at once: (N, S, S, 3) uint8 to the same."""

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


def copy_baseline(
    captions: Sequence[str],
    own_index: Indices,
    training_captions: Sequence[str],
    training_index: Indices,
    gallery: Images,
) -> RetrievalReport:
    """Return the report of a copier, which answers with the picture of the nearest training caption.

    `own_index` (N,) and `training_index` (T,) are the positions in `gallery` (M, S, S, 3) of the pictures of
    the held-out and of the training captions. R@1 is 0 unless a picture is in both, that is, the split leaks;
    R@5 is what the neighbourhood of a training picture is worth.
    """
    if len(captions) != len(own_index) or len(training_captions) != len(training_index):
        held_out = f"{len(captions)} captions with {len(own_index)} own_index"
        training = f"{len(training_captions)} training_captions with {len(training_index)} training_index"
        raise ValueError(f"got {held_out} and {training}; expected one position for each caption")
    copied = np.asarray(training_index)[nearest_training_captions(captions, training_captions)]
    return report(retrieval_ranks(gallery[copied], gallery, own_index))


def derangement(own_index: Indices, seed: int = 0) -> Indices:
    """Return a permutation of 0..N-1 under which nothing keeps its own picture, fixed by the seed.

    ``own_index[result[i]] != own_index[i]`` everywhere: no fixed point, even where captions share a picture.
    Raises where more than half of the captions share one.
    """
    _, group = np.unique(own_index, return_inverse=True)
    sizes = np.bincount(group)
    widest = int(sizes.max(initial=0))
    if widest * 2 > len(group) or not widest:
        raise ValueError(f"{widest} of {len(group)} captions have the same picture; at most half may")
    shuffled = np.random.default_rng(seed).permutation(len(sizes))[group]
    order = np.argsort(shuffled, kind="stable")  # captions of one picture side by side
    result = np.empty(len(group), np.int64)
    result[order] = np.roll(order, widest)
    return result


def shuffled_baseline(generated: Images, gallery: Images, own_index: Indices, seed: int = 0) -> RetrievalReport:
    """Return the report of the generated pictures, (N, S, S, 3), each held against another one's caption."""
    own_index = np.asarray(own_index)
    return report(retrieval_ranks(generated, gallery, own_index[derangement(own_index, seed)]))


def ceiling(reconstruct: Reconstruct, gallery: Images, own_index: Indices) -> RetrievalReport:
    """Return the report of the true pictures, ``gallery[own_index]``, through the autoencoder and back."""
    true = gallery[own_index]
    reconstructed = reconstruct(true)
    if reconstructed.shape != true.shape:
        raise ValueError(f"reconstruct made {reconstructed.shape} of {true.shape}; expected the same shape")
    return report(retrieval_ranks(reconstructed, gallery, own_index))


def _words(caption: str) -> set[str]:
    return set(_WORD.findall(caption.lower()))
