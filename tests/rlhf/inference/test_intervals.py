"""Confidence intervals of means and of win rates."""

import math
import random
from statistics import fmean

import pytest

from rlhf.inference.intervals import mean_interval, win_rate_interval

# Intervals


@pytest.mark.parametrize(
    ("wins", "ties", "losses"),
    [(5, 0, 5), (0, 0, 10), (7, 0, 0), (82, 0, 18), (20, 60, 5), (0, 9, 0), (1, 1, 0)],
)
def test_the_win_rates_interval_holds_what_is_within_z_standard_errors(wins, ties, losses):
    """p is in it if |rate - p| <= 1.96 sqrt((p (1 - p) - t / 4) / n); found here on a fine grid."""
    steps, z = 100_000, 1.959964
    count = wins + ties + losses
    rate, share = (wins + ties / 2) / count, ties / (count + z**2)
    inside = [
        p
        for p in (step / steps for step in range(steps + 1))
        if (rate - p) ** 2 <= z**2 * (p * (1 - p) - share / 4) / count + 1e-15
    ]
    found = win_rate_interval([1.0] * wins + [0.5] * ties + [0.0] * losses)
    assert found == pytest.approx((inside[0], inside[-1]), abs=2 / steps)


def test_wilsons_interval_of_half_of_ten():
    assert win_rate_interval([1.0, 0.0] * 5) == pytest.approx((0.2366, 0.7634), abs=5e-5)


@pytest.mark.parametrize(("count", "t"), [(5, 2.7764), (6, 2.5706), (11, 2.2281), (31, 2.0423)])
def test_students_interval(count, t):
    values = [math.sin(i) for i in range(count)]
    mean = fmean(values)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1))
    low, high = mean_interval(values)
    assert (low + high) / 2 == pytest.approx(mean)
    assert (high - low) / 2 == pytest.approx(t * deviation / math.sqrt(count), rel=3e-3)


def test_equal_values_have_an_interval_without_width():
    assert mean_interval([2.0] * 9) == (2.0, 2.0)


@pytest.mark.parametrize(("win", "tie"), [(0.5, 0.0), (0.9, 0.0), (0.3, 0.4), (0.05, 0.8)])
@pytest.mark.parametrize("count", [20, 200])
def test_the_intervals_hold_the_truth_as_often_as_they_say(win, tie, count):
    rng = random.Random(1)
    truth, runs, hits = win + tie / 2, 1000, [0, 0]
    for _ in range(runs):
        results = rng.choices((1.0, 0.5, 0.0), (win, tie, 1 - win - tie), k=count)
        intervals = win_rate_interval(results), mean_interval(results)
        for i, (low, high) in enumerate(intervals):
            hits[i] += low <= truth <= high
    assert hits[0] / runs > 0.935  # 2 standard errors below 0.95; of few with many ties above
    assert tie or hits[0] / runs < 0.975
    assert count < 200 or 0.92 < hits[1] / runs < 0.97
