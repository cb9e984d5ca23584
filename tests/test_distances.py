"""Distances of clouds of features: closed forms of Gaussians, another implementation, and what intervals must hold."""

import time

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.evaluation.distances import frechet_distance, kid

from .table import table


class Rows(torch.nn.Module):
    """Takes features for images and gives them back."""

    num_features = 6

    def forward(self, rows):
        return rows


def clouds(count=40, width=6, other=None):
    rng = np.random.default_rng(0)
    return rng.normal(0.2, 1, (count, width)), rng.normal(0, 1.3, (other or count, width))


def whitened(count, width, seed):
    """Rows whose mean is 0 and whose covariance is the identity, exactly."""
    rows = np.random.default_rng(seed).normal(size=(count, width))
    rows -= rows.mean(0)
    return np.linalg.qr(rows)[0] * np.sqrt(count - 1)


@table("width", [2, 6, 60])  # more images than features, and fewer
def test_kid_is_that_of_torchmetrics(width):
    one, two = clouds(width=width)
    theirs = KernelInceptionDistance(feature=Rows(), subsets=1, subset_size=len(one))
    theirs.set_dtype(torch.float64)
    theirs.update(torch.from_numpy(two), real=True)
    theirs.update(torch.from_numpy(one), real=False)
    assert kid(one, two, draws=2).value == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


def test_kid_is_its_formula_for_sets_of_two_sizes():
    one, two = clouds(7, 3, 11)

    def mean_kernel(rows, others, same):
        pairs = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(others) if not (same and i == j)]
        return np.mean([(a @ b / 3 + 1) ** 3 for a, b in pairs])

    expected = mean_kernel(one, one, True) + mean_kernel(two, two, True) - 2 * mean_kernel(one, two, False)
    found = kid(one, two, draws=2)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.n == 7


def test_the_interval_of_kid_is_that_of_resampled_features():
    """Resamples written out, with pairs of one image with itself left out."""
    one, two = clouds(12, 3, 15)
    rng = np.random.default_rng(3)

    def mean_kernel(rows, chosen):
        kernel = (rows[chosen] @ rows[chosen].T / 3 + 1) ** 3
        return kernel[chosen[:, None] != chosen[None]].mean()

    found = []
    for _ in range(4000):
        a, b = rng.integers(12, size=12), rng.integers(15, size=15)
        found.append(mean_kernel(one, a) + mean_kernel(two, b) - 2 * ((one[a] @ two[b].T / 3 + 1) ** 3).mean())
    ours = kid(one, two, draws=4000)
    # a quantile of 4,000 draws is known to about 4 % of their spread
    np.testing.assert_allclose([ours.low, ours.high], np.quantile(found, [0.025, 0.975]), atol=0.15 * np.std(found))


def test_kid_of_one_distribution_is_zero_within_its_interval_and_on_average():
    rng = np.random.default_rng(1)
    found = [kid(*rng.normal(size=(2, 50, 8)), draws=200) for _ in range(60)]
    assert np.mean([measure.low <= 0 <= measure.high for measure in found]) >= 0.9
    values = np.array([measure.value for measure in found])
    assert abs(values.mean()) < 3 * values.std() / 60**0.5
    assert values.min() < 0  # unbiased, so also below


def test_kid_of_two_distributions_is_above_its_interval_of_zero():
    one, two = clouds(60)
    assert kid(one + 0.5, two).low > 0


def test_a_thousand_resamples_of_kid_take_seconds():
    rng = np.random.default_rng(0)
    start = time.process_time()
    kid(*rng.normal(size=(2, 200, 1280)))
    assert time.process_time() - start < 10


@table("count", [5, 40])
def test_frechet_distance_is_that_of_torchmetrics(count):
    one, two = clouds(count)
    theirs = FrechetInceptionDistance(feature=Rows(), input_img_size=(6,), normalize=True)
    theirs.set_dtype(torch.float64)
    theirs.update(torch.from_numpy(two), real=True)
    theirs.update(torch.from_numpy(one), real=False)
    # theirs takes square roots of eigenvalues that are 0 but for rounding where images are fewer than features
    assert frechet_distance(one, two, draws=2).value == pytest.approx(float(theirs.compute()), rel=1e-4)


@table("count", [9, 30, 200])
def test_frechet_distance_of_gaussians_on_common_axes_is_its_closed_form(count):
    """|m1 - m2|^2 + sum (s1 - s2)^2; with fewer images than axes, or axes without spread, as well."""
    deviations, others = np.array([1, 2, 0.5, 0, 3, 0]), np.array([2, 1, 0.5, 1, 0, 0])
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(20, 20)))[0][:6]  # six axes of twenty
    one = whitened(count, 6, 1) * deviations @ turn + 0.1
    two = whitened(count, 6, 2) * others @ turn - 0.2
    expected = 20 * 0.3**2 + ((deviations - others) ** 2).sum()
    assert frechet_distance(one, two, draws=2).value == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_on_crossed_axes_is_its_closed_form():
    """In two dimensions tr (S1 S2)^(1/2) = (tr(S1 S2) + 2 det(S1 S2)^(1/2))^(1/2)."""
    root = np.array([[2, 0.7], [0.1, 0.4]])
    one, two = whitened(30, 2, 1) @ root, whitened(30, 2, 2) @ root.T[::-1]
    first, second = np.cov(one.T), np.cov(two.T)
    product = first @ second
    trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(first + second) - 2 * trace
    assert frechet_distance(one, two, draws=2).value == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_falls_with_the_number_of_images():
    one = clouds(80, 10)[0]
    assert frechet_distance(one, one, draws=2).value == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(0)
    values = [frechet_distance(*rng.normal(size=(2, count, 10)), draws=2).value for count in (20, 80, 320)]
    assert values == sorted(values, reverse=True)


@table("width", [5, 60])
def test_the_interval_of_a_frechet_distance_lies_around_it_and_holds_its_mean(width):
    rng = np.random.default_rng(2)
    found = [frechet_distance(rng.normal(0.3, 1, (30, width)), rng.normal(size=(30, width)), 60) for _ in range(30)]
    mean = np.mean([measure.value for measure in found])
    assert all(measure.low < measure.value < measure.high for measure in found)
    assert np.mean([measure.low <= mean <= measure.high for measure in found]) >= 0.83  # 95 %, less 3 standard errors


def test_the_same_seed_gives_the_same_interval():
    one, two = clouds()
    for distance in (kid, frechet_distance):
        assert distance(one, two, draws=20) == distance(one, two, draws=20)
        assert distance(one, two, draws=20, seed=1) != distance(one, two, draws=20)


def test_float32_features_are_measured_in_float64():
    one, two = (rows.astype(np.float32) for rows in clouds())
    for distance in (kid, frechet_distance):
        exact = distance(one.astype(np.float64), two.astype(np.float64), draws=2)
        assert distance(one, two, draws=2) == exact


def test_what_cannot_be_compared_is_refused():
    one, two = clouds(8)
    with pytest.raises(ValueError, match=r"8 images against 7: .* take as many"):
        frechet_distance(one, two[:7])
    for distance in (kid, frechet_distance):
        with pytest.raises(ValueError, match=r"features \(8, 5\), reference \(8, 6\)"):
            distance(one[:, :5], two)
        with pytest.raises(ValueError, match="N, M >= 2"):
            distance(one[:1], two[:1])
        with pytest.raises(ValueError, match="not finite"):
            distance(one * np.nan, two)
