"""How the benchmarks measure: in copies, against baselines of the same minute, after a check.

The unit is the **copy**: the time of one `dst.copy_(src)` between warm buffers of the op's size and
dtype. It says on any machine how far the limit is: to read the logits once takes about 0.5 copies,
to read and write them about 1.0 (on a CPU somewhat less in place: a copy also has to fetch the
cache lines that it overwrites). Memory is what a call holds at its peak beyond its inputs, divided
by the bytes of its logits.

On a GPU times are the device's, from a cold L2, and what a call costs the host is told apart. A
rehearsal runs what a GPU would run on a CPU, with tiny tensors: kernels in Triton's interpreter,
the host's clock instead of the device's. Its figures mean nothing.
"""

import ctypes
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARIES = (32000, 50257, 128256, 151936)
# (tokens, vocabulary) by setting, the most telling first: a run may be cut short.
SIZES = {
    "cpu": [(512, 32000), (256, 128256), (256, 50257), (64, 151936)],
    "cuda": [(tokens, V) for tokens in (8192, 133, 1, 65537) for V in VOCABULARIES],
    "rehearsal": [(3, 67), (1, 1032)],
}
# More tokens and fewer, to show what a call costs as they grow.
GROWING_SIZES = {
    "cpu": [(tokens, 32000) for tokens in (1, 8, 64, 2048)],
    "cuda": [(tokens, 32000) for tokens in (8, 64, 512)],
    "rehearsal": [(2, 67)],
}
# (tokens, channels, vocabulary) of hidden states and a head.
LINEAR_SIZES = {
    "cpu": [(512, 512, 32000), (2048, 512, 128256)],
    "cuda": [(8192, 4096, 128256)],
    "rehearsal": [(3, 8, 67)],
}
# (rows, length) of rewards.
GAE_SIZES = {
    "cpu": [(512, 2048), (16, 131072)],
    "cuda": [(8192, 2048), (16, 131072), (512, 2048)],
    "rehearsal": [(3, 70)],
}
# (rows, vocabulary) to draw from: a step of generation.
SAMPLING_SIZES = {
    "cpu": [(64, 49152), (64, 151936)],
    "cuda": [(133, 151936), (8192, 32000), (8192, 151936)],
    "rehearsal": [(3, 67), (1, 1032)],
}
# torch.compile takes seconds to minutes for each size, so it takes part in few.
COMPILED = [(512, 32000), (256, 128256), (8192, 32000), (8192, 128256), (3, 67)]
# Plain PyTorch needs up to ten times the logits in memory.
MOST_EAGER_TOKENS = 8192
DTYPES = [torch.float32, torch.bfloat16]
# A GPU repeats itself, and is lent for minutes.
ROUNDS = {"cpu": 31, "cuda": 15, "rehearsal": 3}
# A slow baseline takes part in as many rounds as fit into this, or into the op's own time; at least
# one.
SECONDS_PER_BASELINE = {"cpu": 1.0, "cuda": 0.3, "rehearsal": 0.1}


@dataclass(frozen=True)
class Setting:
    """Where a run measures, `name` being "cpu", "cuda" or "rehearsal", with which backend, and
    whether peers take part."""

    name: str
    device: torch.device
    backend: str
    peers: bool


@dataclass(frozen=True)
class Contest:
    """An op and what it is measured against. All functions take nothing and run the whole call.

    `copied` is the tensor whose copy is the unit. `moved_bytes` is the least that the op has to
    read and write. `reset`, untimed, runs before each round, for an op that overwrites its input.
    `check` raises AssertionError when the op's results are worse than eager PyTorch's. `rounds`
    are fewer than usual for an op of seconds.
    """

    op: Callable[[], object]
    baselines: dict[str, Callable[[], object]]
    copied: Tensor
    moved_bytes: int
    check: Callable[[], None]
    reset: Callable[[], None] = lambda: None
    rounds: int | None = None


def checked(x: Tensor) -> Tensor:
    """The rows that are compared with fp64: the first two and the last two."""
    return torch.cat([x[:2], x[2:][-2:]])


def check_accuracy(
    name: str,
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    scale: float = 0.0,
    fp32_roundings: int = 0,
) -> None:
    """Raises AssertionError unless `got` errs at most twice as much as `eager` against the fp64
    `truth`, give or take four roundings of the largest value, or of `scale`, the size of terms that
    cancel in it; and so many of fp32, which eager may be spared by luck in a single row."""
    roundings = 4 * torch.finfo(got.dtype).eps + fp32_roundings * torch.finfo(torch.float32).eps
    slack = roundings * max(scale, truth.abs().max().item())
    error, eager_error = ((x.double() - truth).abs().max().item() for x in (got, eager))
    if not error <= 2 * eager_error + slack:
        raise AssertionError(f"{name}: error {error:.3g}, eager PyTorch's is {eager_error:.3g}")


def check_rows(name: str, got: Tensor, eager: Tensor, truth: Tensor, **slack: float) -> None:
    """`check_accuracy` of the checked rows of `got`, of which all others have to be finite too.

    Their sum says so: a test of each element would take another tensor of that size.
    """
    if not got.sum(dtype=torch.float32).isfinite():
        raise AssertionError(f"{name}: not finite everywhere")
    check_accuracy(name, checked(got), eager, truth, **slack)


def check_agreement(baseline: Tensor, op: Tensor) -> None:
    """Raises AssertionError unless a baseline computes what the op does, if not to the last
    digit."""
    atol = 0.01 * op.abs().max().item()
    torch.testing.assert_close(baseline.float(), op.float(), rtol=0.03, atol=atol)


class Times(NamedTuple):
    """Seconds that a call takes, for how many of them the caller waits, and whether the device
    waited for the host, so that the former hold some of the latter."""

    seconds: float
    call: float
    host_bound: bool


class Clock:
    """Wall time of one call."""

    def __call__(self, function: Callable[[], object]) -> Times:
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
        return Times(seconds, seconds, host_bound=True)


class GpuClock:
    """Time on the device between two events around one call, from a cold L2; it holds the events'
    own microsecond or two.

    `make_event` makes events such as `torch.cuda.Event`.
    """

    # While the L2 is flushed this often the host has time to queue the call.
    FLUSHES = 16

    def __init__(self, device: torch.device, l2_bytes: int, make_event: Callable[[], object]):
        self.flush = torch.zeros(l2_bytes, dtype=torch.float32, device=device)  # four times the L2
        self.make_event = make_event

    def __call__(self, function: Callable[[], object]) -> Times:
        start, end = self.make_event(), self.make_event()
        for _ in range(self.FLUSHES):
            self.flush.sum()  # what is written would be written back while the call runs
        start.record()
        called = time.perf_counter()
        function()
        returned = time.perf_counter()
        host_bound = start.query()
        end.record()
        end.synchronize()
        return Times(start.elapsed_time(end) * 1e-3, returned - called, host_bound)


class HostEvent:
    """Stands for a `torch.cuda.Event` in a rehearsal."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "HostEvent") -> float:
        return (end.time - self.time) * 1e3


def make_clock(setting: Setting) -> Clock | GpuClock:
    if setting.name == "cpu":
        return Clock()
    if setting.name == "rehearsal":
        return GpuClock(setting.device, 1024, HostEvent)
    l2_bytes = torch.cuda.get_device_properties(setting.device).L2_cache_size
    return GpuClock(setting.device, l2_bytes, lambda: torch.cuda.Event(enable_timing=True))


class Rounds:
    """Times an op and its baselines in turns, with a copy before each of them.

    The memory speed of a shared machine can drift by a factor of two within minutes, so times from
    different minutes give no ratio. `prepare` is the untimed half of a round (the baselines),
    `run_op` the other: `benchmark.pedantic(rounds.run_op, setup=rounds.prepare)`.
    """

    def __init__(self, contest: Contest, clock: Clock | GpuClock, setting: Setting):
        self.contest, self.clock, self.setting = contest, clock, setting
        # What the op reads must not be in a CPU's cache; a GPU has no room for a third tensor.
        flushes = isinstance(clock, GpuClock)
        self.source = contest.copied.detach() if flushes else contest.copied.detach().clone()
        self.target = torch.empty_like(self.source)
        self.times = defaultdict(list)
        self.rounds = contest.rounds or ROUNDS[setting.name]
        for function in (contest.op, *contest.baselines.values()):
            contest.reset()
            function()  # compiles, warms up
        self.copy()

    def spent(self, name: str) -> float:
        return sum(times.seconds for times in self.times[name])

    def copy(self) -> None:
        self.target.copy_(self.source)

    def prepare(self) -> None:
        rounds = len(self.times["op"])
        share = max(
            SECONDS_PER_BASELINE[self.setting.name] * rounds / self.rounds, self.spent("op")
        )
        for name, function in self.contest.baselines.items():
            if rounds == 0 or self.spent(name) < share:
                self.contest.reset()
                self.times["copy"].append(self.clock(self.copy))
                self.times[name].append(self.clock(function))
        self.contest.reset()
        self.times["copy"].append(self.clock(self.copy))

    def run_op(self) -> None:
        self.times["op"].append(self.clock(self.contest.op))

    def figures(self) -> dict[str, float]:
        """Medians: `copies`, `times_<baseline>` (how often faster) and GB/s of op and copy; on a
        GPU also microseconds on the device, microseconds until the call returns, and in which share
        of the rounds the device waited for the host."""
        median = {
            name: statistics.median(each.seconds for each in times)
            for name, times in self.times.items()
        }
        copied_bytes = 2 * self.source.numel() * self.source.element_size()
        figures = {
            "copies": median["op"] / median["copy"],
            "copy_gb_per_s": copied_bytes / median["copy"] * 1e-9,
            "gb_per_s": self.contest.moved_bytes / median["op"] * 1e-9,
        }
        for name in self.contest.baselines:
            figures[f"times_{name}"] = median[name] / median["op"]
        if isinstance(self.clock, GpuClock):
            figures["device_us"] = median["op"] * 1e6
            figures["call_us"] = statistics.median(each.call for each in self.times["op"]) * 1e6
            figures["host_bound"] = statistics.mean(each.host_bound for each in self.times["op"])
        return figures


def peak_bytes_cpu(function: Callable[[], object]) -> int:
    counter = ctypes.CDLL(None)
    counter.peak_malloc_bytes.restype = ctypes.c_long
    counter.peak_malloc_reset()
    result = function()
    peak = counter.peak_malloc_bytes()
    del result
    return peak


def _peak_bytes_cuda(function: Callable[[], object], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def extra_memory(contest: Contest) -> dict[str, float]:
    """Peak bytes of the op and of its baselines beyond their inputs, divided by those of `copied`;
    compiled PyTorch aside, whose compiling takes minutes.

    On a CPU it must run in the process that `memory_process` makes: a profiler of PyTorch's
    allocator would not see what C++ allocates for itself.
    """
    device, size = contest.copied.device, contest.copied.numel() * contest.copied.element_size()
    functions = {"memory": contest.op}
    functions |= {f"memory_{name}": f for name, f in contest.baselines.items() if name != "compile"}
    ratios = {}
    for name, function in functions.items():
        contest.reset()
        function()  # allocations of a first call only: thread pools, caches
        contest.reset()
        if device.type == "cuda":
            ratios[name] = _peak_bytes_cuda(function, device) / size
        else:
            ratios[name] = peak_bytes_cpu(function) / size
    return ratios


def extra_memory_of(make_contest: Callable[..., Contest], *arguments) -> dict[str, float]:
    """`extra_memory` of a contest that is made here: tensors do not travel between processes."""
    return extra_memory(make_contest(*arguments))


def memory_process(folder: Path) -> ProcessPoolExecutor:
    """A process in which every malloc is counted. Needs glibc and a C compiler (`cc` or `CC`).

    Raises OSError or subprocess.CalledProcessError without them.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"malloc is counted on Linux with glibc only, this is {sys.platform}")
    counter = folder / "peak_malloc.so"
    source = Path(__file__).with_name("peak_malloc.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(counter)],
        check=True,
        capture_output=True,
    )
    preloaded = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = str(counter) if preloaded is None else f"{counter}:{preloaded}"
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()  # started while the environment says so
    finally:
        if preloaded is None:
            del os.environ["LD_PRELOAD"]
        else:
            os.environ["LD_PRELOAD"] = preloaded
    return pool
