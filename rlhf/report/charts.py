"""The charts of `rlhf report`: SVG that reads on light and on dark, the same bytes for the same
figures."""

import re
from collections.abc import Iterable, Sequence
from io import StringIO
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# What the page shows first of each stage, and the card: title, and what it says. On the page the
# other metrics follow, folded.
MAIN_METRICS = {
    "ppo": {
        "objective/scores": ("Score", "all rewards, weighted and summed"),
        "rewards/gold": ("Gold score", "of the reward gold, unweighted"),
        "objective/kl": ("KL to the reference", "nats per response"),
        "objective/rlhf_reward": ("Reward with penalties", "score, KL and missing ends"),
        "policy/clipfrac": ("Clip fraction", "share of tokens whose ratio was clipped"),
        "policy/approxkl": ("Approximate KL", "of the updates, from the policy that sampled"),
        "policy/entropy": ("Entropy", "nats per token"),
        "loss/value": ("Value loss", "of the critic"),
        "val/explained_variance": ("Explained variance", "of the returns, by the critic"),
        "tokens/response_len": ("Response length", "tokens"),
        "tokens/eos_rate": ("Ended by itself", "share of responses"),
        "kl_coef": ("KL coefficient", "weight of the penalty"),
        "lr": ("Learning rate", "of the policy"),
        "tokens_per_second": ("Speed", "response tokens per second"),
    },
    "reward": {
        "loss": ("Loss", "−log σ of the margin"),
        "accuracy": ("Accuracy", "share of pairs in the right order"),
        "margin": ("Margin", "score of the better answer less that of the worse"),
        "grad_norm": ("Gradient norm", "before clipping"),
        "lr": ("Learning rate", ""),
    },
    "sft": {
        "loss": ("Loss", "nats per token"),
        "eval/perplexity": ("Perplexity", "on held-out data"),
        "grad_norm": ("Gradient norm", "before clipping"),
        "lr": ("Learning rate", ""),
        "tokens_per_second": ("Speed", "tokens per second"),
    },
}
MEANS = {
    "score": "Score",
    "rewards/gold": "Gold score",
    "tokens": "Length in tokens",
    "ended": "Ended by itself",
}
MAX_POINTS = 400  # of a curve
MAX_FIGURE = float(np.finfo(np.float32).max)  # in fp64 sums and squares of such are finite
MANY_POINTS = 50  # from here on a smoothed line helps, and markers do not
BEFORE, AFTER, HELD_OUT, GREY = "#94a3b8", "#3b82f6", "#f59e0b", "#808894"
STYLE = {
    **{"svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25},
    **{"figure.facecolor": "none", "axes.facecolor": "none"},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
    "text.parse_math": False,  # A reward's name may hold dollars.
    **{name: GREY for name in ("axes.edgecolor", "axes.labelcolor", "grid.color", "text.color")},
    **{f"{axis}tick.{name}": GREY for axis in "xy" for name in ("color", "labelcolor")},
}


class Chart(NamedTuple):
    """`source` names the figures that `svg` draws, `about` says what they are."""

    title: str
    source: str
    about: str
    svg: str
    last: float | None = None


def finite(value: object) -> float | None:
    """A number as it is; None for what is none, or is not finite in fp32, as figures of a run."""
    return value if isinstance(value, int | float) and abs(value) <= MAX_FIGURE else None


def points(records: Iterable[dict], *names: str) -> tuple[list[float], ...]:
    """The values of each of these figures, of the records where all have a finite one."""
    rows = [[finite(record.get(name)) for name in names] for record in records]
    rows = [row for row in rows if None not in row]
    return tuple([float(row[i]) for row in rows] for i in range(len(names)))


def find_judges(names: Iterable[str], weights: object) -> list[str]:
    """Of a run's metrics those of rewards that weigh nothing: they judge, but do not train. Metrics
    `rewards/<name>` come in the order of reward_weights."""
    rewards = [name for name in dict.fromkeys(names) if name.startswith("rewards/")]
    if not isinstance(weights, list) or len(weights) != len(rewards):
        return []
    return [name for name, weight in zip(rewards, weights, strict=True) if weight == 0]


def describe(stage: str, name: str, judges: Sequence[str]) -> tuple[str, str]:
    """A metric's title, and what it says."""
    if name in MAIN_METRICS[stage]:
        title, about = MAIN_METRICS[stage][name]
    else:
        title = name.removeprefix("eval/")
        about = "" if title == name else "on held-out data"
    return title, "judges, but does not train" if name in judges else about


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS of a curve: the least and the greatest value of stretches of equal
    length, so that no spike is lost."""
    if len(values) <= MAX_POINTS:
        return steps, values
    kept = set()
    for part in np.array_split(np.arange(len(values)), MAX_POINTS // 2):
        kept |= {part[values[part].argmin()], part[values[part].argmax()]}
    rows = sorted(kept)
    return steps[rows], values[rows]


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the twentieth of the curve around each point."""
    count, half = len(values), len(values) // 40 + 1
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(count) - half, 0)
    end = np.minimum(np.arange(count) + half + 1, count)
    return (sums[end] - sums[first]) / (end - first)


def new_axes(xlabel: str, ylabel: str = "") -> Axes:
    axes = Figure(figsize=(4.4, 2.5)).add_axes((0.15, 0.19, 0.82, 0.72))
    xlabel = xlabel.encode("utf-8", "replace").decode()  # A folder's name may hold any bytes.
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.ticklabel_format(useOffset=False, scilimits=(-3, 5))
    return axes


def to_svg(axes: Axes, name: str) -> str:
    """The figure as an SVG element; `name` keeps its ids apart from those of
    the page's other charts."""
    text = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": ascii(name)}):
        FigureCanvasSVG(axes.figure).print_svg(text, metadata=nothing)
    svg = text.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])


@rc_context(STYLE)
def draw_curve(
    stage: str, name: str, curves: list[tuple[str, str, np.ndarray]], judges: Sequence[str]
) -> Chart:
    """A metric over the steps: curves with a label, a colour, and steps and values (2, points)."""
    axes = new_axes("step")
    for label, colour, (steps, values) in curves:
        if len(values) < MANY_POINTS:
            axes.plot(steps, values, color=colour, marker=".", label=label)
        else:
            axes.plot(*thin(steps, values), color=colour, linewidth=0.6, alpha=0.5)
            axes.plot(*thin(steps, smooth(values)), color=colour, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) > 1:
        axes.legend()
    title, about = describe(stage, name, judges)
    _, _, (_, values) = curves[0]
    return Chart(title, name, about, to_svg(axes, f"{stage} {name}"), values[-1])


def draw_curves(stage: str, records: list[dict], judges: Sequence[str]) -> dict:
    """The charts of a stage's metrics, each with the same on held-out data: `curves` has those of
    MAIN_METRICS, `more` the others, and `empty` the names of metrics without a finite value;
    `smoothed` tells whether there are thick lines. `judges` are those of `find_judges`."""
    names = {name for record in records for name in record} - {"step", "episodes"}
    curves = {name: np.array(points(records, "step", name)) for name in names}
    curves = {name: curve for name, curve in curves.items() if curve.size}
    pairs, partners = {}, set()
    for name, curve in curves.items():
        pairs[name] = [("training", AFTER, curve)]
        short = name.removeprefix("objective/").removeprefix("tokens/")
        if f"eval/{short}" in curves:
            pairs[name].append(("held-out", HELD_OUT, curves[f"eval/{short}"]))
            partners.add(f"eval/{short}")
    first = [name for name in MAIN_METRICS[stage] if name in curves]
    more = sorted(curves.keys() - set(first) - partners)
    return {
        "curves": [draw_curve(stage, name, pairs[name], judges) for name in first],
        "more": [draw_curve(stage, name, pairs[name], judges) for name in more],
        "empty": sorted(names - curves.keys()),
        "smoothed": any(curve.shape[1] >= MANY_POINTS for curve in curves.values()),
    }


@rc_context(STYLE)
def draw_frontier(records: list[dict]) -> list[Chart]:
    """What each iteration's score costs in KL: over √KL, in which Gao et al. (2022, "Scaling Laws
    for Reward Model Overoptimization") found the gold score to rise and then fall."""
    charts = []
    for name in ("rewards/gold", "objective/scores"):
        steps, kl, values = map(np.array, points(records, "step", "objective/kl", name))
        if not len(values):
            continue
        kept = np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).astype(int)
        root = np.sqrt(kl[kept].clip(min=0))  # The estimate of a KL near 0 may be below it.
        steps, values = steps[kept], values[kept]
        axes = new_axes("√KL to the reference, √nats", "mean of an iteration")
        axes.plot(root, values, color=GREY, linewidth=0.6, alpha=0.5)
        colours = colormaps["plasma"](np.linspace(0.3, 0.8, len(values)))
        axes.scatter(root, values, c=colours, s=22, zorder=3)
        for i, offset in {0: 7, len(values) - 1: -14}.items():
            place = {"xytext": (0, offset), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"step {steps[i]:.0f}", (root[i], values[i]), **place)
        axes.margins(0.12)
        title = MAIN_METRICS["ppo"][name][0] + " against KL"
        about = "each point is a logged iteration, from violet to orange"
        charts.append(Chart(title, name, about, to_svg(axes, f"frontier {name}"), values[-1]))
    return charts


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where it is not defined."""
    spread = len(x) > 1 and np.std(x) > 0 and np.std(y) > 0
    return float(np.corrcoef(x, y)[0, 1]) if spread else None


def flat_answers(rows: list[dict], side: str) -> list[dict]:
    """The answers of one side, their rewards as figures `rewards/<name>` beside the score."""
    answers = [row[side] for row in rows]
    return [
        answer | {f"rewards/{name}": x for name, x in answer["rewards"].items()}
        for answer in answers
    ]


@rc_context(STYLE)
def draw_comparison(rows: list[dict]) -> dict:
    """Means (name, before, after) and charts of the answers before and after PPO."""
    sides = [flat_answers(rows, side) for side in ("before", "after")]
    colours = (("before", BEFORE), ("after", AFTER))
    rewards = {name for answers in sides for answer in answers for name in answer}
    rewards = sorted(name for name in rewards if name.startswith("rewards/"))
    means, charts, seen = [], [], []
    for name in ("score", *rewards, "tokens", "ended"):
        pair = [points(answers, name)[0] for answers in sides]
        # Of several rewards the score may be one, where the others weigh nothing.
        if not all(pair) or pair in seen:
            continue
        seen.append(pair)
        means.append((MEANS.get(name, name), *map(fmean, pair)))
        if name == "ended":
            continue
        axes = new_axes(name, "answers")
        least, greatest = min(map(min, pair)), max(map(max, pair))
        # Of a constant 1e17 NumPy's own bins would have no width.
        margin = max(0.5, abs(least) / 2) if least == greatest else 0
        bins = np.linspace(least - margin, greatest + margin, 25)
        for values, (label, colour) in zip(pair, colours, strict=True):
            axes.hist(values, bins, color=colour, alpha=0.65, label=label)
        axes.legend()
        about = "how many answers have which"
        charts.append(Chart(MEANS.get(name, name), name, about, to_svg(axes, f"answers {name}")))
    pairs = [points(answers, "tokens", "score") for answers in sides]
    links = [correlation(*pair) for pair in pairs]
    means.append(("correlation of score and length", *links))
    axes = new_axes("tokens", "score")
    for pair, (label, colour) in zip(pairs, colours, strict=True):
        axes.scatter(*pair, color=colour, s=14, alpha=0.7, label=label)
    axes.legend()
    about = "whether longer answers score higher"
    charts.append(Chart("Length bias", "score, tokens", about, to_svg(axes, "length bias")))
    return {"means": means, "charts": charts}
