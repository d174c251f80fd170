"""Confidence intervals of means over prompts, and of win rates."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, pvariance, stdev

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
Interval = tuple[float, float]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of independent values; None for fewer than 5, of which the
    spread says little.

    Of differences between two policies on the same prompts it is the paired interval. The quantile
    of t is Z with the correction in the degrees of freedom of Abramowitz and Stegun, 26.7.5, right
    to 3 in 1000 from 4 degrees on.
    """
    count = len(values)
    if count < 5:
        return None
    nu = count - 1
    t = (
        Z
        + (Z**3 + Z) / (4 * nu)
        + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * nu**2)
        + (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * nu**3)
    )
    half = t * stdev(values) / math.sqrt(count)
    return fmean(values) - half, fmean(values) + half


def win_rate_interval(results: Sequence[float]) -> Interval:
    """Wilson's score interval (1927, JASA 22, 209-212) of the mean of results that are 1 for a win,
    0 for a loss and 1/2 for a tie, with their variance v in place of a coin's, p (1 - p)::

        (p + z²/2n ± z √(v/n + z²/4n²)) / (1 + z²/n)

    A tie share t takes t/4 from the variance at any p: v = p (1 - p) - t/4. So these are the p with
    n (mean - p)² <= z² (p (1 - p) - t'/4), where t' counts z² more results, none of them a tie, as
    Agresti and Coull do (1998, The American Statistician 52, 119-126). Without ties it is Wilson's;
    many ties, which equal random numbers bring about, make it narrow, and where all results are
    alike it keeps a width, as a bootstrap's would not. Swapped policies mirror it.
    """
    count, rate = len(results), fmean(results)
    centre = rate + Z**2 / (2 * count)
    half = Z * math.sqrt(pvariance(results) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return (centre - half) / scale, (centre + half) / scale
