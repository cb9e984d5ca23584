"""The retrieval metric against the written-out reference, and against what must hold on any images."""

import math

import numpy as np
import pytest

from ldm.evaluation.retrieval import (
    feature_distances,
    pixel_distances,
    ranks_among,
    recalls,
    retrieval_ranks,
)
from tests import reference_retrieval as reference

from .table import table


def blocky(count: int, seed: int = 0, size: int = 64) -> np.ndarray:
    """Random images of 8 x 8 coloured squares: far apart, so float32 ranks them like exact arithmetic."""
    squares = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return squares.repeat(size // 8, axis=1).repeat(size // 8, axis=2)


def framed(count: int, seed: int = 0, size: int = 64) -> np.ndarray:
    """Random images in the middle of white paper, an eighth of the size on each side."""
    images = blocky(count, seed, size)
    edge = size // 8
    for side in (np.s_[:, :edge], np.s_[:, -edge:], np.s_[:, :, :edge], np.s_[:, :, -edge:]):
        images[side] = 255
    return images


def noisy(images: np.ndarray, strength: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, strength, (len(images), 16, 16, 3))
    return np.clip(images + noise.repeat(4, 1).repeat(4, 2), 0, 255).astype(np.uint8)


@table("make", [blocky, framed])
def test_ranks_equal_the_reference(make) -> None:
    gallery = make(120)
    own = np.random.default_rng(1).permutation(120)[:24]
    for strength in (0, 200, 800):  # all right, some right, hardly any right
        generated = np.roll(noisy(gallery[own], strength), (2, -1), axis=(1, 2))
        expected = reference.retrieval_ranks(generated, gallery, own)
        np.testing.assert_array_equal(retrieval_ranks(generated, gallery, own), expected)
    assert len(set(expected)) > 5  # the last ranks are no trivial ones


def test_recall_and_interval_equal_the_reference() -> None:
    ranks = np.random.default_rng(0).integers(0, 12, 90)
    for k, measure in recalls(ranks).items():
        assert measure.value == reference.recall(ranks, k)
        assert (measure.low, measure.high) == reference.bootstrap_interval(ranks, k)


def test_a_true_image_is_right_under_every_shift_up_to_3_pixels() -> None:
    gallery = framed(10)
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            generated = np.roll(gallery[[7]], (dy, dx), axis=(1, 2))
            assert retrieval_ranks(generated, gallery, np.array([7])) == [0]


def test_a_shift_of_4_pixels_is_too_far() -> None:
    image = framed(1)
    gallery = np.concatenate([image, np.roll(image, 1, axis=2)])
    generated = np.roll(image, 4, axis=2)  # 3 pixels from the second image, 4 from the first
    assert retrieval_ranks(generated, gallery, np.array([0])) == [1]
    assert retrieval_ranks(generated, gallery, np.array([1])) == [0]


def test_ties_are_misses() -> None:
    gallery = blocky(6)
    gallery[4] = gallery[2]
    ranks = retrieval_ranks(gallery, gallery, np.arange(6))
    np.testing.assert_array_equal(ranks, [0, 0, 1, 0, 1, 0])


def test_images_that_differ_by_one_level_of_one_pixel_are_told_apart() -> None:
    """Float32 cannot: its rounding of |q|^2 + |k|^2 - 2qk is a hundred times their distance."""
    gallery = blocky(1).repeat(8, axis=0)
    for index in range(8):
        gallery[index, 8 * index, 30, 1] ^= 1
    np.testing.assert_array_equal(retrieval_ranks(gallery, gallery, np.arange(8)), np.zeros(8))


def test_copying_another_image_of_the_gallery_is_never_right() -> None:
    gallery = blocky(1).repeat(8, axis=0)
    for index in range(8):
        gallery[index, 8 * index, 30, 1] ^= 1
    own = np.arange(8)
    assert (retrieval_ranks(gallery[np.roll(own, 1)], gallery, own) > 0).all()


def test_ranks_do_not_depend_on_the_resolution() -> None:
    """Shifts are 3/64 of the size: images of doubled pixels are shifted by twice as many of them."""
    gallery, own = blocky(40), np.arange(12)
    generated = noisy(gallery[own], 400)
    doubled = [images.repeat(2, axis=1).repeat(2, axis=2) for images in (generated, gallery)]
    ranks = retrieval_ranks(generated, gallery, own)
    np.testing.assert_array_equal(retrieval_ranks(*doubled, own), ranks)
    assert len(set(ranks)) > 3


@table(("size", "shift"), [(16, 0), (32, 1), (48, 2), (96, 4), (256, 12)])
def test_every_multiple_of_16_pixels_is_taken(size: int, shift: int) -> None:
    gallery = framed(6, size=size)
    generated = np.roll(gallery, shift, axis=1)
    np.testing.assert_array_equal(retrieval_ranks(generated, gallery, np.arange(6)), np.zeros(6))


def test_a_part_of_the_images_has_the_ranks_it_has_among_all() -> None:
    gallery, own = blocky(50), np.arange(20)
    generated = noisy(gallery[own], 600)
    ranks = retrieval_ranks(generated, gallery, own)
    np.testing.assert_array_equal(retrieval_ranks(generated[:7], gallery, own[:7]), ranks[:7])


@table("hits", [3, 60, 170])
def test_bootstrap_interval_has_the_quantiles_of_the_binomial(hits: int) -> None:
    """A resample's hits are Binomial(n, p); the quantile of 10,000 draws is at most one hit away."""
    n = 200
    ranks = np.where(np.arange(n) < hits, 0, 9)
    p = hits / n
    mass = [math.comb(n, count) * p**count * (1 - p) ** (n - count) for count in range(n + 1)]
    expected = np.searchsorted(np.cumsum(mass), [0.025, 0.975]) / n
    found = recalls(ranks, [1])[1]
    np.testing.assert_allclose([found.low, found.high], expected, atol=1 / n + 1e-9)


def test_wrong_input_is_refused_with_what_came_and_what_is_allowed() -> None:
    images, own = blocky(3), np.arange(3)
    for generated, gallery, own_index, message in [
        (images / 255, images, own, r"generated is float64 .* expected uint8"),
        (images, images[:, :40, :40], own, "gallery is .* multiple of 16"),
        (images, images[:, :48, :48], own, "gallery is at 48 px, generated at 64 px"),
        (images, images, own[:2], r"own_index is int64 \(2,\); expected whole numbers \(3,\)"),
        (images, images, own / 1, "own_index is float64"),
        (images, images, own - 1, r"own_index is in -1\.\.1; the gallery has positions 0\.\.2"),
        (images, images, own + 1, r"own_index is in 1\.\.3"),
    ]:
        with pytest.raises(ValueError, match=message):
            retrieval_ranks(generated, gallery, own_index)


def test_feature_distances_are_cosines_and_ranks_count_what_is_as_near_or_nearer() -> None:
    degrees = np.radians([0, 30, 60, 120, 35])
    gallery = np.stack([np.cos(degrees), np.sin(degrees)], 1) * np.array([[1], [9], [1], [1], [0.1]])
    generated = np.array([[2.0, 0.1], [-0.1, 5], [5, 3]])  # at about 3, 91 and 31 degrees
    distances = feature_distances(generated, gallery)
    assert distances[0, 0] == pytest.approx(1 - np.cos(np.arctan(0.05)))
    np.testing.assert_array_equal(ranks_among(distances, np.array([0, 2, 1])), [0, 1, 0])
    np.testing.assert_array_equal(ranks_among(distances, np.array([3, 0, 2])), [4, 4, 2])
    with pytest.raises(ValueError, match=r"own_index is in 1\.\.9; the gallery has positions 0\.\.4"):
        ranks_among(distances, np.array([1, 2, 9]))


def test_recalls_are_shares_of_ranks_below_k() -> None:
    found = recalls(np.array([0, 0, 3, 7, 40]))
    assert {k: measure.value for k, measure in found.items()} == {1: 0.4, 5: 0.6, 10: 0.8}
    assert all(measure.low <= measure.value <= measure.high for measure in found.values())
    with pytest.raises(ValueError, match="nothing was measured"):
        recalls(np.array([], np.int64))


def test_pixel_distances_are_those_of_the_best_shift() -> None:
    gallery = framed(9)
    generated = np.roll(noisy(gallery[:4], 300), (1, -2), axis=(1, 2))
    keys = reference.coarse(gallery).astype(np.float64)
    padded = np.pad(generated, ((0, 0), (3, 3), (3, 3), (0, 0)), constant_values=255)
    shifted = [padded[:, 3 + y : 67 + y, 3 + x : 67 + x] for y in reference.SHIFTS for x in reference.SHIFTS]
    each = [((reference.coarse(query)[:, None] - keys) ** 2).sum(2) for query in shifted]
    of_sums = (255 * 16) ** 2  # blocks of 4 x 4 pixels, 0 to 255
    np.testing.assert_allclose(pixel_distances(generated, gallery), np.min(each, axis=0) * of_sums, rtol=1e-4)
