"""How the benchmarks measure: in copies, against baselines of the same minute, after a check.

The unit is the **copy**: the time of one `dst.copy_(src)` between warm buffers of the op's size and
dtype. It says on any machine how far the limit is: to read the logits once takes about 0.5 copies,
to read and write them about 1.0 (on a CPU somewhat less in place: a copy also has to fetch the
cache lines that it overwrites). Memory is what a call holds at its peak beyond its inputs, divided
by the bytes of its logits.
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

import torch
from torch import Tensor

# Tokens and vocabulary: those that the goals name, and further vocabularies of real models.
SHAPES = [(512, 32000), (256, 128256)]
MORE_SHAPES = [(256, 50257), (64, 151936)]
DTYPES = [torch.float32, torch.bfloat16]
# Rows of the timed call whose results are checked.
CHECKED_ROWS = [0, 1, -2, -1]
ROUNDS = 31
# A slow baseline takes part in as many rounds as fit into this, at least one.
SECONDS_PER_BASELINE = 1.0


@dataclass(frozen=True)
class Contest:
    """An op and what it is measured against. All functions take nothing and run the whole call.

    `copied` is the tensor whose copy is the unit. `moved_bytes` is the least that the op has to
    read and write. `reset`, untimed, runs before each round, for an op that overwrites its input.
    `check` raises AssertionError when the op's results are worse than eager PyTorch's.
    """

    op: Callable[[], object]
    baselines: dict[str, Callable[[], object]]
    copied: Tensor
    moved_bytes: int
    check: Callable[[], None]
    reset: Callable[[], None] = lambda: None


def check_accuracy(name: str, got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Raises AssertionError unless `got` errs at most twice as much as `eager` against the fp64
    `truth`, give or take two roundings of the largest value."""
    slack = 2 * torch.finfo(got.dtype).eps * truth.abs().max().item()
    error, eager_error = ((x.double() - truth).abs().max().item() for x in (got, eager))
    if not error <= 2 * eager_error + slack:
        raise AssertionError(f"{name}: error {error:.3g}, eager PyTorch's is {eager_error:.3g}")


class Clock:
    """Seconds of one call: wall time on the CPU; on a GPU between two events, from a cold L2."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.flushed = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The flush also gives the host time to queue the call: launch latency is not measured.
        self.flushed.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


class Rounds:
    """Times an op and its baselines in turns, with a copy before each of them.

    The memory speed of a shared machine can drift by a factor of two within minutes, so times from
    different minutes give no ratio. `prepare` is the untimed half of a round (the baselines),
    `run_op` the other: `benchmark.pedantic(rounds.run_op, setup=rounds.prepare)`.
    """

    def __init__(self, contest: Contest, clock: Clock):
        self.contest, self.clock = contest, clock
        self.source = contest.copied.detach().clone()
        self.target = torch.empty_like(self.source)
        self.times = defaultdict(list)
        for function in (contest.op, *contest.baselines.values()):
            contest.reset()
            function()  # compiles, warms up
        self.copy()

    def copy(self) -> None:
        self.target.copy_(self.source)

    def prepare(self) -> None:
        self.contest.reset()
        rounds = len(self.times["op"])
        for name, function in self.contest.baselines.items():
            share = SECONDS_PER_BASELINE * rounds / ROUNDS
            if rounds == 0 or sum(self.times[name]) < share:
                self.times["copy"].append(self.clock(self.copy))
                self.times[name].append(self.clock(function))
        self.times["copy"].append(self.clock(self.copy))

    def run_op(self) -> None:
        self.times["op"].append(self.clock(self.contest.op))

    def figures(self) -> dict[str, float]:
        """Medians: `copies`, `times_<baseline>` (how often faster) and GB/s of op and copy."""
        median = {name: statistics.median(times) for name, times in self.times.items()}
        copied_bytes = 2 * self.source.numel() * self.source.element_size()
        figures = {
            "copies": median["op"] / median["copy"],
            "copy_gb_per_s": copied_bytes / median["copy"] * 1e-9,
            "gb_per_s": self.contest.moved_bytes / median["op"] * 1e-9,
        }
        for name in self.contest.baselines:
            figures[f"times_{name}"] = median[name] / median["op"]
        return figures


def _peak_bytes_cpu(function: Callable[[], object]) -> int:
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


def extra_memory(make_contest: Callable[..., Contest], *arguments) -> dict[str, float]:
    """Peak bytes of the op and of eager PyTorch beyond their inputs, divided by those of `copied`.

    Runs in the process that `memory_process` makes: a profiler of PyTorch's allocator would not see
    what C++ allocates for itself.
    """
    contest = make_contest(*arguments)
    device, size = contest.copied.device, contest.copied.numel() * contest.copied.element_size()
    functions = {"memory": contest.op}
    if "eager" in contest.baselines:
        functions["memory_eager"] = contest.baselines["eager"]
    ratios = {}
    for name, function in functions.items():
        contest.reset()
        function()  # allocations of a first call only: thread pools, caches
        contest.reset()
        if device.type == "cuda":
            ratios[name] = _peak_bytes_cuda(function, device) / size
        else:
            ratios[name] = _peak_bytes_cpu(function) / size
    return ratios


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
