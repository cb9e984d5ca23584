"""Precision, recall, density, coverage, spread: points whose neighbourhoods can be counted by hand."""

import numpy as np
import pytest

from ldm.evaluation.neighbours import euclidean, manifold_measures, share_nearer, spread

from .table import table


def naive(features, reference, k):
    """The definitions, one pair at a time: Kynkaanniemi et al. 2019, eq. 1; Naeem et al. 2020, eqs. 3 and 4."""

    def reach(rows, index):
        return sorted(np.linalg.norm(rows[index] - row) for row in rows)[k]  # the first is itself

    def inside(row, rows):
        return [np.linalg.norm(row - other) <= reach(rows, index) for index, other in enumerate(rows)]

    within = np.array([inside(row, reference) for row in features])
    return {
        "precision": within.any(1).mean(),
        "recall": np.mean([any(inside(row, features)) for row in reference]),
        "density": within.sum() / (k * len(features)),
        "coverage": within.any(0).mean(),
    }


@table("shift", [0.0, 1.0, 3.0])
@table("k", [1, 3, 5])
def test_the_four_are_their_definitions(shift, k):
    rng = np.random.default_rng(0)
    features, reference = rng.normal(size=(20, 3)) + shift, rng.normal(size=(24, 3))
    found = manifold_measures(features, reference, k)
    assert {name: measure.value for name, measure in found.items()} == pytest.approx(naive(features, reference, k))


def test_equal_sets_are_perfect_and_distant_ones_have_nothing_in_common():
    rows = np.random.default_rng(1).normal(size=(30, 4))
    same = manifold_measures(rows, rows)
    assert [same[name].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert {measure.value for measure in manifold_measures(rows, rows + 100).values()} == {0}


def test_one_point_drawn_over_and_over_is_precise_and_covers_little():
    reference = np.random.default_rng(2).normal(size=(100, 2))
    found = manifold_measures(np.repeat(reference[:1], 100, 0) + 1e-9, reference)
    assert found["precision"].value == 1
    assert found["recall"].value < 0.05
    assert found["coverage"].value < 0.2


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="5 and 9 images; neighbours need more than 5"):
        manifold_measures(np.zeros((5, 2)), np.zeros((9, 2)))


def test_distances_are_euclidean_to_rounding():
    one, two = np.random.default_rng(3).normal(size=(2, 7, 5))
    expected = np.linalg.norm(one[:, None] - two[None], axis=-1)
    np.testing.assert_allclose(euclidean(one, two), expected, atol=1e-12)


def test_nearer_to_training_is_a_share_and_ties_are_half():
    assert share_nearer(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 2.0, 2.0])).value == (1 + 0.5) / 4
    assert share_nearer(np.zeros(5), np.ones(5)).value == 1


def test_spread_is_within_over_across():
    # two prompts at 0 and 10, each with images at +1 and -1: 2 within; 10, 10, 8 and 12 across
    features = np.array([[1.0], [-1.0], [11.0], [9.0]])
    prompt = np.array([0, 0, 1, 1])
    assert spread(features, prompt).value == pytest.approx(2 / 10)
    assert spread(np.array([[0.0], [0.0], [5.0], [5.0]]), prompt).value == 0
    many = np.random.default_rng(4).normal(size=(400, 3))
    assert spread(many, np.arange(400) // 20).value == pytest.approx(1, abs=0.03), "the prompt decides nothing"
    with pytest.raises(ValueError, match="2 prompts of 1 images"):
        spread(features[:3], prompt[:3])
