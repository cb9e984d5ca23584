"""Intervals: what a bootstrap must give where theory says what it is."""

import numpy as np
import pytest

from ldm.evaluation.measure import Measure, bootstrap, mean_of


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = mean_of(values, draws=4000)
    error = values.std() / 400**0.5
    assert found.value == pytest.approx(values.mean())
    # 4,000 draws put a quantile within about 3 % of the standard error
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_nine_of_ten_intervals_and_more_hold_the_truth():
    rng = np.random.default_rng(2)
    held = [m.low <= 0.3 <= m.high for m in (mean_of(rng.random(100) < 0.3, draws=300) for _ in range(200))]
    assert 0.89 <= np.mean(held) <= 0.99  # 95 % nominal, binomial spread of 200 tries 1.5 %


def test_the_same_seed_gives_the_same_interval_and_nothing_is_no_number():
    values = np.arange(10.0)
    assert mean_of(values) == mean_of(values)
    assert mean_of(values, seed=1) != mean_of(values)
    assert bootstrap(lambda rows: float(len(rows)), 5) == Measure(5, 5, 5, 5)
    with pytest.raises(ValueError, match="nothing was measured"):
        mean_of(np.array([]))


def test_a_measure_reads_as_value_and_interval():
    assert str(Measure(0.78, 0.72, 0.835, 200)) == "0.780 (0.720 to 0.835)"
    assert str(Measure(123.456, 100, 150.04, 200)) == "123.5 (100 to 150)"
    assert str(Measure(0.00123, -0.0001, 0.0045, 200)) == "0.00123 (-0.00010 to 0.00450)"
    assert str(Measure(0, 0, 0, 200)) == "0.000 (0.000 to 0.000)"
    assert str(Measure(0.01, 0, 0.025, 200)) == "0.010 (0.000 to 0.025)"
