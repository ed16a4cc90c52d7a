"""scripts/intervals.py: against what is known of means, and what must hold of a p-value.

python -m pytest tests/test_intervals.py
"""

import math

import numpy
import pytest

from intervals import RESAMPLES, Bootstrap

RNG = numpy.random.default_rng(5)
ROWS = 400


@pytest.fixture(scope="module")
def bootstrap():
    """Four systems: one, a bit better, as good with other rows, and the first again."""
    one = RNG.beta(2, 5, ROWS)
    better = one + RNG.normal(0.02, 0.1, ROWS)
    other = RNG.permutation(one)
    return Bootstrap(numpy.stack([one, better, other, one])), (one, better, other)


def test_intervals_are_those_of_a_mean(bootstrap):
    made, (one, better, _) = bootstrap
    assert made.drawn_means.shape == (4, RESAMPLES)
    assert numpy.array_equal(made.intervals[0], made.intervals[3])  # drawn alike
    for figure, values in enumerate((one, better)):
        half = 1.96 * values.std() / math.sqrt(ROWS)
        low, high = made.intervals[figure]
        assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_system_does_not_differ_from_itself(bootstrap):
    assert bootstrap[0].compare(0, 3) == {"difference": 0, "interval": [0, 0], "p": 1}


def test_p_values_are_those_of_a_paired_test(bootstrap):
    made, (one, better, other) = bootstrap
    for figure, values in ((1, better), (2, other)):
        found = made.compare(figure, 0)
        difference = values - one
        z = abs(difference.mean()) / (difference.std() / math.sqrt(ROWS))
        assert found["difference"] == pytest.approx(difference.mean(), abs=1e-12)
        assert found["p"] == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
        half = 1.96 * difference.std() / math.sqrt(ROWS)
        around = [difference.mean() - half, difference.mean() + half]
        assert found["interval"] == pytest.approx(around, abs=0.1 * half)
        backwards = made.compare(0, figure)
        assert (backwards["p"], backwards["difference"]) == (found["p"], -found["difference"])
    # Pairing is what sees it: the two intervals by themselves overlap.
    assert made.compare(1, 0)["p"] < 0.01
    assert made.intervals[1][0] < made.intervals[0][1]


def test_of_few_rows_no_small_p_is_told():
    """Of three differences without a reason, all point the same way once in four times."""
    gains = numpy.array([0.01, 0.02, 0.03])
    assert Bootstrap(numpy.stack([gains, 2 * gains])).compare(1, 0)["p"] == 0.25


def test_the_smallest_p_is_not_zero():
    made = Bootstrap(numpy.stack([numpy.zeros(50), numpy.ones(50)]))
    assert made.compare(1, 0)["p"] == 1 / (1 + RESAMPLES)


def test_the_same_rows_give_the_same_figures_whatever_is_beside_them(bootstrap):
    made, (one, better, _) = bootstrap
    again = Bootstrap(numpy.stack([better, one]))
    assert numpy.allclose(again.intervals, made.intervals[[1, 0]], atol=1e-12)
    assert again.compare(0, 1)["p"] == made.compare(1, 0)["p"]
