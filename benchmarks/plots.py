"""The plots of a page. Each draws into a file, unless there is nothing to draw, and says whether
it did."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.figures import BASELINES, Figures, Run

PLOTTED = ("ppo_loss_", "ppo_loss", "token_logprobs_and_entropy", "kl_divergence")
TOKENS_OP, TOKENS_VOCABULARY = "ppo_loss_", 32000
COLORS = {name: f"C{i + 2}" for i, name in enumerate(BASELINES)}


def _save(fig, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return True


def _by_vocabulary(figures: list[Figures], op: str, dtype: str) -> dict[int, Figures]:
    """Of each vocabulary the size at which most was measured, the largest of those."""
    chosen: dict[int, Figures] = {}
    for f in figures:
        if (f.op, f.dtype) == (op, dtype) and "copies" in f.values:
            best = chosen.get(f.shape[-1])
            if best is None or (len(f.values), f.shape[0]) > (len(best.values), best.shape[0]):
                chosen[f.shape[-1]] = f
    return dict(sorted(chosen.items()))


def _backends(runs: list[Run]) -> dict[str, tuple[list[Figures], str]]:
    """Title of a backend -> its figures and its color."""
    return {f"ppo_kernels ({run.backend})": (run.figures, f"C{i}") for i, run in enumerate(runs)}


def _bars(runs: list[Run], path: Path, own: str, other: Callable, label: str, line: float) -> bool:
    """A panel for each op and dtype, a group of bars for each vocabulary."""
    measured = {f.dtype for run in runs for f in run.figures}
    dtypes = [dtype for dtype in ("float32", "bfloat16") if dtype in measured]
    panels = [(op, dtype) for dtype in dtypes for op in PLOTTED]
    drawn = {}
    for op, dtype in panels:
        series: dict[str, dict[int, float]] = {}
        for title, (figures, color) in _backends(runs).items():
            for V, f in _by_vocabulary(figures, op, dtype).items():
                if own in f.values:
                    series.setdefault((title, color), {})[V] = f.values[own]
                for name, baseline in BASELINES.items():
                    value = other(f, name)
                    if value is not None:
                        series.setdefault((baseline, COLORS[name]), {})[V] = value
        drawn[op, dtype] = series
    if not any(drawn.values()):
        return False
    size = 4.2 * len(PLOTTED), 3.6 * len(dtypes)
    fig, axes = plt.subplots(
        len(dtypes), len(PLOTTED), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, ((op, dtype), series) in zip(axes.flat, drawn.items(), strict=True):
        vocabularies = sorted({V for values in series.values() for V in values})
        width = 0.8 / max(1, len(series))
        for i, ((title, color), values) in enumerate(series.items()):
            at = [vocabularies.index(V) + (i - (len(series) - 1) / 2) * width for V in values]
            ax.bar(at, values.values(), width, label=title, color=color)
        ax.axhline(line, color="black", linewidth=0.8, linestyle=":")
        ax.set_xticks(range(len(vocabularies)), [f"{V:,}" for V in vocabularies])
        ax.set_yscale("log")
        ax.set_title(f"{op}, {dtype}", fontsize=10)
        ax.set_xlabel("vocabulary")
    for row in axes:
        row[0].set_ylabel(label)
    legends = [ax.get_legend_handles_labels() for ax in axes.flat]
    entries = {
        title: bar for bars, titles in legends for title, bar in zip(titles, bars, strict=True)
    }
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries))
    return _save(fig, path)


def copies(runs: list[Run], path: Path) -> bool:
    """Time in copies by vocabulary; dotted: one copy."""

    def of(f: Figures, name: str) -> float | None:
        faster = f.values.get(f"times_{name}")
        return None if faster is None else f.values["copies"] * faster

    return _bars(runs, path, "copies", of, "copies (lower is better)", 1.0)


def memory(runs: list[Run], path: Path) -> bool:
    """Extra memory by vocabulary; dotted: as much as the logits."""

    def of(f: Figures, name: str) -> float | None:
        return f.values.get(f"memory_{name}")

    return _bars(runs, path, "memory", of, "extra bytes / bytes of the logits", 1.0)


def tokens(runs: list[Run], path: Path) -> bool:
    """Time of a call as tokens grow; dotted: a copy of the logits."""
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    series: dict[tuple[str, str, str], dict[int, float]] = {}
    for title, (figures, color) in _backends(runs).items():
        for f in sorted(figures, key=lambda f: f.shape):
            at = f.op, f.shape[-1], f.dtype
            if at != (TOKENS_OP, TOKENS_VOCABULARY, "float32") or "copies" not in f.values:
                continue
            time = f.values["milliseconds"]
            series.setdefault((title, color, "o-"), {})[f.shape[0]] = time
            copy = time / f.values["copies"]
            series.setdefault(("copy", "black", ":"), {})[f.shape[0]] = copy
            for name, baseline in BASELINES.items():
                if f"times_{name}" in f.values:
                    theirs = time * f.values[f"times_{name}"]
                    series.setdefault((baseline, COLORS[name], "s--"), {})[f.shape[0]] = theirs
    if all(len(values) < 2 for values in series.values()):
        plt.close(fig)
        return False
    for (title, color, style), values in series.items():
        ax.plot(values.keys(), values.values(), style, color=color, label=title)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel(f"tokens (V = {TOKENS_VOCABULARY:,}, float32)")
    ax.set_ylabel("ms (lower is better)")
    ax.set_title(f"{TOKENS_OP}: loss and gradient")
    ax.legend()
    return _save(fig, path)


PLOTS = {"copies": copies, "memory": memory, "tokens": tokens}
