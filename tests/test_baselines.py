"""Floors and ceiling: each has images for which its number is known."""

import math
from collections import Counter

import numpy as np
import pytest

from ldm.evaluation.baselines import (
    derangement,
    exchanged_captions,
    nearest_training_captions,
    other_values,
)

from .table import table


def images(count: int, seed: int = 0) -> np.ndarray:
    squares = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return squares.repeat(4, axis=1).repeat(4, axis=2)


@table(
    ("caption", "training", "expected"),
    [
        ("man juggling dark skin tone", ["woman surfing", "man juggling light skin tone", "dark moon"], 1),
        ("Mrs. Claus!", ["mr claus", "MRS, claus"], 1),  # neither case nor punctuation counts
        ("medium-dark skin tone", ["dark medium skin tone", "medium-dark skin tone"], 1),  # one word
        ("red zebra", ["red cat", "red dog", "red fox", "grey zebra"], 3),  # the rare word weighs more
        ("big cat", ["a big cat on a red mat", "cat"], 1),  # what is not asked for counts against
        ("big cat", ["small dog", "cat big", "big cat"], 1),  # the first of equals
        ("zebra", ["cat", "dog"], 0),
        ("", ["cat", ""], 0),
    ],
)
def test_nearest_training_caption(caption: str, training: list[str], expected: int) -> None:
    np.testing.assert_array_equal(nearest_training_captions([caption], training), [expected])


def test_nearest_training_captions_maximise_the_weighted_jaccard_index() -> None:
    rng = np.random.default_rng(0)
    captions = [" ".join(f"w{word}" for word in rng.geometric(0.1, rng.integers(1, 7))) for _ in range(90)]
    captions, training = captions[:30], captions[30:]

    def weight(words: set[str]) -> float:
        having = [sum(word in caption.split() for caption in training) for word in words]
        return math.fsum(1 + math.log((1 + len(training)) / (1 + count)) for count in having)

    for caption, index in zip(captions, nearest_training_captions(captions, training), strict=True):
        words = set(caption.split())
        others = [set(other.split()) for other in training]
        scores = [round(weight(words & other) / weight(words | other), 12) for other in others]
        assert index == scores.index(max(scores))


@table(("first", "second"), [("a b c", "d e f"), ("d e f", "a b c")])
def test_equals_stay_equal_in_floating_point(first: str, second: str) -> None:
    """The same three weights, added in another order, differ in the last bit for some sizes of the data."""
    for others in range(40):
        training = [
            first,
            second,
            *"bccdee",
            *"g" * others,
        ]  # a and f once, b and d twice, c and e three times
        np.testing.assert_array_equal(nearest_training_captions(["a b c d e f"], training), [0])


def test_nothing_to_copy_from_is_refused() -> None:
    with pytest.raises(ValueError, match="training_captions is empty"):
        nearest_training_captions(["cat"], [])


@table("count", [2, 3, 4, 17, 200])
def test_a_derangement_is_a_permutation_without_fixed_point(count: int) -> None:
    for seed in range(20):
        result = derangement(np.arange(count), seed)
        np.testing.assert_array_equal(np.sort(result), np.arange(count))
        assert (result != np.arange(count)).all()
    np.testing.assert_array_equal(derangement(np.arange(count)), derangement(np.arange(count)))


def test_a_derangement_gives_no_caption_another_one_of_its_own_image() -> None:
    own = np.array([5, 2, 5, 9, 2, 5])
    for seed in range(20):
        result = derangement(own, seed)
        np.testing.assert_array_equal(np.sort(result), np.arange(6))
        assert (own[result] != own).all()


@table("own", [[], [3], [1, 1, 2]])
def test_a_derangement_that_cannot_be_is_refused(own: list[int]) -> None:
    with pytest.raises(ValueError, match="at most half may"):
        derangement(np.array(own, np.int64))


def test_other_values_are_others_and_any_of_them():
    classes = [0] * 900 + [1] * 90 + [2] * 10
    others = other_values(classes, seed=1)
    assert all(own != other for own, other in zip(classes, others, strict=True))
    assert others == other_values(classes, seed=1)
    counts = Counter(others[:900])
    assert counts.keys() == {1, 2}
    assert abs(counts[1] - 450) < 4 * 15  # four standard deviations of a fair coin
    with pytest.raises(ValueError, match="all 3 values are the same"):
        other_values([5, 5, 5])


def test_exchanged_captions_are_the_same_ones_and_none_is_anyones_own() -> None:
    captions = ["red cat", "red cat", "blue dog", "green fox", "red cat", "old hat", "new hat"]
    exchanged = exchanged_captions(captions, seed=3)
    assert sorted(exchanged) == sorted(captions)
    assert all(other != own for other, own in zip(exchanged, captions, strict=True))
    assert exchanged == exchanged_captions(captions, seed=3)
    assert len({tuple(exchanged_captions(captions, seed)) for seed in range(9)}) > 1
    with pytest.raises(ValueError, match="half"):
        exchanged_captions(["red cat", "red cat", "red cat", "blue dog"])
