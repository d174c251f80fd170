"""The curves, means and figures of the report's page."""

import re
import statistics

import numpy as np
import pytest

from rlhf.ppo.metrics import NUM_COMPLETIONS
from rlhf.report import charts
from rlhf.report.page import numbers
from tests.rlhf.helpers.pages import answer, make_stage, report, words, write_completions


def test_means_correlations_and_gains(tmp_path):
    folder = make_stage(tmp_path / "run", "ppo", [])
    before = [answer("a", 1.0, 2), answer("b", 2.0, 4), answer("c", 4.0, 3, ended=False)]
    after = [answer("d", 3.0, 1), answer("e", 2.0, 1), answer("f", 4.0, 1)]
    before[0]["rewards"], after[0]["rewards"] = {"gold": 0.25, "x": None}, {"gold": 0.75, "x": None}
    write_completions(folder, list(zip("pqr", before, after, strict=True)))
    text = words(report(folder))
    assert "Score 2.33 3.00" in text and "Gold score 0.250 0.750" in text
    assert "Length in tokens 3.00 1.00" in text and "Ended by itself 0.67 1.00" in text
    expected = statistics.correlation([2, 4, 3], [1.0, 2.0, 4.0])
    assert f"correlation of score and length {expected:.3f} –" in text
    assert "after 3.00 +2.00" in text and "after 2.00 +0.00" in text
    assert "before 4.00 3 tokens, cut off" in text


def test_long_runs_and_texts_make_no_large_page(tmp_path):
    rng = np.random.default_rng(0)
    names = ("objective/scores", "objective/kl", "rewards/gold", "policy/clipfrac")
    records = [
        {"step": i, **dict(zip(names, rng.random(4), strict=True))} for i in range(1, 30_001)
    ]
    folder = make_stage(tmp_path / "run", "ppo", records)
    long = "word " * 40_000
    write_completions(folder, [(long, answer(long, 0.0), answer(long, 1.0))] * NUM_COMPLETIONS)
    page = report(folder)
    assert len(page) < 1.5e6 and "(197,999 more characters)" in page
    assert "the same 128 prompts" in page and "116 more prompts" in page


def test_frontier_is_over_the_root_of_kl_and_of_the_score_where_there_is_no_gold():
    kl = [-0.01, 1.0, 4.0, 9.0]
    records = [
        {"step": i, "objective/kl": x, "objective/scores": 2.0 * i} for i, x in enumerate(kl)
    ]
    (chart,) = charts.draw_frontier([*records, {"step": 9, "eval/kl": 1.0}])
    dots = re.findall(r'href="#C\w+" x="([\d.]+)" y="([\d.]+)"', chart.svg)
    x, y = np.array(dots, dtype=float).T
    np.testing.assert_allclose(np.diff(x), x[1] - x[0], atol=1e-3)  # √KL is 0, 1, 2, 3,
    np.testing.assert_allclose(np.diff(y), y[1] - y[0], atol=1e-3)  # and the score 0, 2, 4, 6.
    assert len(dots) == 4 and y[0] > y[-1] and chart.last == 6.0
    for record in records:
        record["rewards/gold"] = 1.0
    gold, score = charts.draw_frontier(records * 500)
    assert (gold.source, score.last) == ("rewards/gold", 6.0)
    assert score.svg.count("<use") < charts.MAX_POINTS + 50


def test_thin_keeps_spikes_and_smooth_is_a_mean_around():
    steps, values = np.arange(10_000), np.sin(np.arange(10_000) / 500)
    values[[1234, 8765]] = 9.0, -9.0
    kept, heights = charts.thin(steps, values)
    assert len(kept) <= charts.MAX_POINTS and {1234, 8765} <= set(kept)
    assert (heights == values[kept]).all() and (np.diff(kept) > 0).all()
    short = values[:90]
    expected = [short[max(i - 3, 0) : i + 4].mean() for i in range(90)]
    np.testing.assert_allclose(charts.smooth(short), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.00998, 0.694], ["0.010", "0.694"]),
        ([-0.641, 5.88], ["−0.64", "5.88"]),
        ([1234.5, 2], ["1,234", "2"]),
        ([999.7], ["1,000"]),
        ([1e-05], ["1.00e−05"]),
        ([0.0, None], ["0", "–"]),
    ],
)
def test_figures_that_belong_together_have_as_many_decimals(values, shown):
    assert numbers(values) == shown
