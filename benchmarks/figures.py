"""What a run measured, and the goals: from the JSON of `pytest benchmarks`."""

import itertools
import json
from pathlib import Path
from typing import NamedTuple


class Column(NamedTuple):
    """A figure: its title, its format, and whether a low one is good."""

    title: str
    format: str
    low_is_good: bool


# What an op is measured against. `times_<name>`: how often faster the op is; `memory_<name>`.
BASELINES = {
    "eager": "eager",
    "compile": "torch.compile",
    "trl": "TRL",
    "liger": "Liger",
    "torchrl": "torchrl's loop",
    "torchrl_vec": "torchrl vectorised",
    "pufferlib": "PufferLib",
    "cumsum": "softmax, cumsum, searchsorted",
    "transformers": "transformers' filters",
}
# Baselines that do less than the op: their figure is the op's time in units of theirs.
PARTS = {
    "matmuls": "three matmuls",
    "logprobs": "token_logprobs_and_entropy",
}
PHASES = ("sample", "evaluate", "update")

COLUMNS = {
    "milliseconds": Column("ms", "{:,.4f}", True),
    "copies": Column("copies", "{:.2f}", True),
    **{f"times_{name}": Column(f"× {title}", "{:.2f}", False) for name, title in BASELINES.items()},
    **{f"cost_{name}": Column(f"time / {title}", "{:.2f}", True) for name, title in PARTS.items()},
    "memory": Column("extra memory", "{:.5f}", True),
    "memory_without_gradients": Column("memory without gradients", "{:.5f}", True),
    **{f"memory_{name}": Column(f"of {of}", "{:.2f}", True) for name, of in BASELINES.items()},
    "gb_per_s": Column("GB/s", "{:.1f}", False),
    "copy_gb_per_s": Column("of copy", "{:.1f}", False),
    "bandwidth_share": Column("share", "{:.0%}", False),
    "call_us": Column("call µs", "{:,.1f}", True),
    **{f"{phase}_seconds": Column(f"{phase} s", "{:.2f}", True) for phase in PHASES},
    "tokens_per_second": Column("tokens/s", "{:,.0f}", False),
    **{f"{x}_tokens_per_second": Column(f"{x} tokens/s", "{:,.0f}", False) for x in PHASES},
    "peak_mb": Column("peak MB", "{:,.0f}", True),
}  # fmt: skip
CAPTION = (
    "copies: time / time of copying as many logits (gae: inputs) in the same run; "
    "× eager and the like: how often faster; "
    "extra memory: peak bytes beyond the inputs / bytes of the logits (gae: inputs); "
    "memory without gradients: extra memory less the gradients returned to the caller; "
    "ms: on a GPU the device's, and call µs until the call returns to the host; "
    "share: of the copy's GB/s"
)

# Families of ops, in the order of the page. An op of another name makes a family of its own.
FAMILIES = {
    "ppo_loss": ("ppo_loss_", "ppo_loss"),
    "linear": ("linear_ppo_loss", "linear_token_logprobs_and_entropy"),
    "logprobs": (
        "token_logprobs_and_entropy",
        "token_logprobs_and_entropy backward",
        "token_statistics",
        "token_logprobs",
    ),
    "sampling": ("sample_tokens", "sample_tokens, filtered"),
    "kl": ("kl_divergence", "kl_divergence backward"),
    "gae": ("gae", "gae, 1 in 50 done", "gae, 1 in 4 done", "gae_packed"),
    "trainer": ("PPO iteration",),
}
OPS = tuple(itertools.chain(*FAMILIES.values()))


def _over_logits(shapes: list[tuple[int, int]], **goals: dict[str, float]) -> dict:
    """Goals of ops over logits, in each dtype that they are measured in."""
    return {
        (op, shape, dtype): named
        for op, named in goals.items()
        for shape in shapes
        for dtype in ("float32", "bfloat16")
    }


# (label, shape, dtype) -> figure -> goal, on a CPU with two cores.
GOALS = _over_logits(
    [(512, 32000), (256, 128256)],
    ppo_loss_={"copies": 1.3, "times_eager": 20, "times_compile": 6, "memory": 0.001},
    ppo_loss={"copies": 1.8},
    token_logprobs_and_entropy={"copies": 1.0},
    token_statistics={"cost_logprobs": 1.15},
    kl_divergence={"copies": 1.6},
)
GOALS |= {
    ("linear_ppo_loss", (2048, 512, 128256), "float32"): {
        "memory_without_gradients": 0.10,
        "cost_matmuls": 1.15,
        "times_compile": 1,
        "times_eager": 1.5,
    },
    ("token_logprobs", (1, 2), "float32"): {"milliseconds": 0.020},
    **{
        ("sample_tokens", (64, V), "float32"): {"copies": 1.3, "times_cumsum": 8}
        for V in (49152, 151936)
    },
    ("gae", (512, 2048), "float32"): {"copies": 2.0, "times_eager": 50},
    ("gae", (16, 131072), "float32"): {"copies": 2.0},
    ("gae, 1 in 50 done", (512, 2048), "float32"): {
        "times_torchrl": 40,
        "times_torchrl_vec": 300,
        "times_pufferlib": 5,
    },
    ("PPO iteration, V = 1,024", (64, 64), "float32"): {"update_seconds": 1.2},
}
# The same on a GPU.
VOCABULARIES = (32000, 50257, 128256, 151936)
GPU_GOALS = _over_logits([(133, V) for V in VOCABULARIES], ppo_loss_={"copies": 1.2})
GPU_GOALS |= _over_logits(
    [(n, V) for n in (8192, 65537) for V in VOCABULARIES],
    ppo_loss_={"copies": 1.08, "memory": 0.001},
    ppo_loss={"copies": 1.15},
    token_logprobs_and_entropy={"copies": 0.55},
    kl_divergence={"copies": 1.10},
)
# Its rows do not begin at multiples of 16 bytes.
GPU_GOALS |= _over_logits(
    [(n, 50257) for n in (8192, 65537)], ppo_loss_={"copies": 1.15, "memory": 0.001}
)
GPU_GOALS |= {
    ("token_logprobs", (1, 2), "float32"): {"call_us": 20},
    ("gae", (512, 2048), "float32"): {"copies": 1.3, "times_compile": 1},
    ("gae", (16, 131072), "float32"): {"copies": 1.3, "times_compile": 1},
}


class Figures(NamedTuple):
    """What was measured of one op at one size; `label` is the op, and its variant if it has one."""

    op: str
    label: str
    shape: tuple[int, ...]
    dtype: str
    values: dict[str, float]
    why_no_memory: str | None
    goals: dict[str, float]

    @property
    def size(self) -> str:
        dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(self.dtype, self.dtype)
        return " × ".join(f"{n:,}" for n in self.shape) + f" {dtype}"

    def reaches(self, name: str) -> bool:
        value, goal = self.values[name], self.goals[name]
        return value <= goal if COLUMNS[name].low_is_good else value >= goal

    def text(self, name: str) -> str:
        """The figure beside its goal; "" if there is neither."""
        goal = goal_text(name, self.goals[name]) if name in self.goals else None
        if name not in self.values:
            return "" if goal is None else f"not measured, {goal}"
        text = COLUMNS[name].format.format(self.values[name])
        return text if goal is None else f"{text} {goal} {'✓' if self.reaches(name) else '✗'}"


class Run(NamedTuple):
    """A file: the machine, the figures of each benchmark, what was left out and why, and the goals
    on such a machine."""

    path: Path
    machine: dict
    figures: list[Figures]
    left_out: list[str]
    goals: dict

    @property
    def backend(self) -> str:
        return self.machine.get("backend") or "auto"

    @property
    def families(self) -> dict[str, list[Figures]]:
        """The figures of each family of ops."""
        groups: dict[str, list[Figures]] = {}
        for f in self.figures:
            name = next((name for name, ops in FAMILIES.items() if f.op in ops), f.op)
            groups.setdefault(name, []).append(f)
        return groups


class Goal(NamedTuple):
    """What was to be reached, and what was: None if it was not measured, and perhaps why."""

    what: str
    goal: str
    measured: str | None
    reached: bool
    reason: str


def goal_text(name: str, goal: float) -> str:
    return f"{'≤' if COLUMNS[name].low_is_good else '≥'} {goal:g}"


def columns_of(figures: list[Figures]) -> list[str]:
    """The figures that any has, or has a goal for."""
    return [name for name in COLUMNS if any(name in f.values or name in f.goals for f in figures)]


def _values(benchmark: dict) -> dict[str, float]:
    info = dict(benchmark["extra_info"])
    for phase in PHASES:
        for name in ("seconds", "tokens_per_second"):
            if phase in info.get(f"phase_{name}", {}):
                info[f"{phase}_{name}"] = info[f"phase_{name}"][phase]
    info |= {f"cost_{name}": 1 / info[f"times_{name}"] for name in PARTS if f"times_{name}" in info}
    values = {"milliseconds": benchmark["stats"]["median"] * 1e3}
    values |= {name: info[name] for name in COLUMNS if name in info}
    if "call_us" in values:
        values["bandwidth_share"] = values["gb_per_s"] / values["copy_gb_per_s"]
    return values


def _figures(benchmark: dict, goals: dict) -> Figures:
    info = benchmark["extra_info"]
    op, shape, dtype = info["op"], tuple(info["shape"]), info["dtype"]
    label = f"{op}, {info['variant']}" if "variant" in info else op
    why_no_memory = info.get("memory_not_measured")
    its_goals = goals.get((label, shape, dtype), {})
    return Figures(op, label, shape, dtype, _values(benchmark), why_no_memory, its_goals)


def read(path: Path) -> Run:
    """Raises ValueError, naming the file, if it is not the JSON of a run."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        machine, benchmarks = run["machine_info"], run["benchmarks"]
        goals = GOALS if machine.get("gpu") is None else GPU_GOALS
        figures = [_figures(benchmark, goals) for benchmark in benchmarks]
        left_out = [f"{each['name']}: {each['reason']}" for each in run.get("left_out", [])]
        for benchmark in benchmarks:
            if "peers_failed" in (info := benchmark["extra_info"]):
                left_out.append(f"peers of {benchmark['name']}: {info['peers_failed']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must hold the JSON of `pytest benchmarks`: {error!r}") from None
    order = {op: i for i, op in enumerate(OPS)}
    figures.sort(key=lambda f: order.get(f.op, len(order)))
    return Run(path, machine, figures, left_out, goals)


def goals_of(run: Run) -> list[Goal]:
    """Every goal of this kind of machine, whatever was measured."""
    figures = {(f.label, f.shape, f.dtype): f for f in run.figures}
    goals = []
    for key, named in run.goals.items():
        f = figures.get(key) or Figures(key[0], *key, {}, None, named)
        for name, goal in named.items():
            measured, reason = None, ""
            if name in f.values:
                measured = COLUMNS[name].format.format(f.values[name])
            elif name.startswith("memory"):
                reason = f.why_no_memory or ""
            reached = measured is not None and f.reaches(name)
            what = f"{f.label} {f.size}: {COLUMNS[name].title}"
            goals.append(Goal(what, goal_text(name, goal), measured, reached, reason))
    return goals
