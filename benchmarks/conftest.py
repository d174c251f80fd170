"""`pytest benchmarks`: the fixtures that turn a Contest into figures."""

import gc
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import (
    GAE_SIZES,
    GROWING_SIZES,
    LINEAR_SIZES,
    SAMPLING_SIZES,
    SIZES,
    Rounds,
    Setting,
    extra_memory,
    extra_memory_of,
    make_clock,
    memory_process,
)
from ppo_kernels import __version__, dispatch

# Figures are worth little where other work was running.
LOAD_BEFORE = round(os.getloadavg()[0], 1)
START = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device to measure on: cpu or cuda")
    parser.addoption("--backend", default="auto", help="backend of ppo_kernels to measure")
    parser.addoption(
        "--rehearse",
        action="store_true",
        help="run on the CPU, with tiny tensors and TRITON_INTERPRET=1 in the environment, what "
        "--device cuda would run",
    )
    parser.addoption(
        "--no-baselines", action="store_true", help="measure ppo_kernels and the copy only"
    )
    parser.addoption(
        "--peers",
        help="folder of other packages to measure beside, "
        "where they are not installed: trl, liger_kernel, torchrl, pufferlib",
    )
    parser.addoption(
        "--results", type=Path, help="JSON file of figures, complete after every benchmark"
    )
    parser.addoption(
        "--seconds", type=float, default=float("inf"), help="no benchmark starts after so many"
    )


def pytest_configure(config):
    if config.getoption("peers") is not None:
        # Last: a torch beside them must not take the place of this one.
        sys.path.append(os.path.abspath(config.getoption("peers")))
    if config.getoption("results") is not None:
        config.pluginmanager.register(Results(config.getoption("results"), machine(config)))


def _setting(config):
    with_peers = peers.installed() and not config.getoption("no_baselines")
    if config.getoption("rehearse"):
        return Setting("rehearsal", torch.device("cpu"), "triton", with_peers)
    device = torch.device(config.getoption("device"))
    return Setting(device.type, device, config.getoption("backend"), with_peers)


def _processor():
    if not Path("/proc/cpuinfo").exists():
        return platform.processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    if "cpu family" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def _gpu(setting):
    if setting.name == "rehearsal":
        return "none: a rehearsal on the CPU, figures mean nothing"
    return torch.cuda.get_device_name(setting.device) if setting.name == "cuda" else None


def _triton_version():
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def machine(config):
    """What explains the figures, and not whose machine it is."""
    info = dispatch.build_info()
    return {
        "processor": _processor(),
        "simd": info and info["simd"],
        "threads": torch.get_num_threads(),
        "gpu": _gpu(_setting(config)),
        "backend": config.getoption("backend"),
        "peers": peers.versions() if _setting(config).peers else None,
        "load before": LOAD_BEFORE,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "ppo_kernels": __version__,
    }


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["machine_info"] = machine(config)


class Results:
    """Writes the figures after every benchmark, so that a run cut short loses none; of those
    without figures, the reason. The keys are those of pytest-benchmark."""

    def __init__(self, path, machine_info):
        self.path = path
        self.run = {"machine_info": machine_info, "benchmarks": [], "left_out": []}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed or report.skipped:
            reason = call.excinfo.exconly(tryshort=True).splitlines()[0]
            self.run["left_out"].append({"name": item.name, "reason": reason})
            # The frames hold the benchmark's tensors, and pytest keeps the frames.
            traceback.clear_frames(call.excinfo.tb)
        elif call.when == "call":
            benchmark = item.funcargs["benchmark"]
            info = benchmark.extra_info
            seconds = benchmark.stats.stats.median
            if "device_us" in info:
                seconds = info["device_us"] * 1e-6
            figures = {"name": item.name, "extra_info": info, "stats": {"median": seconds}}
            self.run["benchmarks"].append(figures)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(self.run, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)
        return report


def pytest_generate_tests(metafunc):
    name = _setting(metafunc.config).name
    by_fixture = {
        "shape": SIZES,
        "growing_shape": GROWING_SIZES,
        "linear_shape": LINEAR_SIZES,
        "gae_shape": GAE_SIZES,
        "sampling_shape": SAMPLING_SIZES,
    }
    for fixture, sizes in by_fixture.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, sizes[name], ids=str)


def pytest_collection_modifyitems(config, items):
    """Every op's first size comes before any op's second."""
    sizes = SIZES[_setting(config).name]

    def rank(item):
        shape = item.callspec.params.get("shape") if hasattr(item, "callspec") else None
        return sizes.index(shape) if shape in sizes else 0

    items.sort(key=rank)


@pytest.fixture(scope="session")
def setting(request):
    return _setting(request.config)


@pytest.fixture(scope="session")
def clock(setting):
    return make_clock(setting)


@pytest.fixture(scope="session")
def memory_pool(setting, tmp_path_factory):
    """The process that measures memory on a CPU, or the reason why there is none."""
    if setting.name == "cuda":
        yield None
        return
    try:
        pool = memory_process(tmp_path_factory.mktemp("peak_malloc"))
    except (OSError, subprocess.CalledProcessError) as error:
        yield str(error)
    else:
        with pool:
            yield pool


@pytest.fixture(autouse=True)
def in_time(request):
    limit = request.config.getoption("seconds")
    if time.monotonic() - START > limit:
        pytest.skip(f"the {limit:.0f} seconds were over")


@pytest.fixture
def measure(request, benchmark, clock, setting, memory_pool):
    """measure(op, make_contest, shape, dtype): check, time and weigh the contest."""

    def ready(make_contest, shape, dtype, setting):
        torch.manual_seed(0)
        contest = make_contest(shape, dtype, setting)
        contest.check()
        if request.config.getoption("no_baselines"):
            contest = replace(contest, baselines={})
        return contest, Rounds(contest, clock, setting)

    def figures(op, make_contest, shape, dtype):
        used = setting
        try:
            contest, rounds = ready(make_contest, shape, dtype, used)
        except Exception as error:
            if not used.peers:
                raise
            # If it was a peer that failed, the op still has its figures.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            traceback.clear_frames(error.__traceback__)
            used = replace(setting, peers=False)
            contest, rounds = ready(make_contest, shape, dtype, used)
            benchmark.extra_info["peers_failed"] = reason
        benchmark.group = op
        benchmark.pedantic(rounds.run_op, setup=rounds.prepare, rounds=rounds.rounds)
        benchmark.extra_info |= {"op": op, "shape": list(shape), "dtype": str(dtype)[6:]}
        benchmark.extra_info |= rounds.figures()
        if setting.name == "cuda":
            benchmark.extra_info |= extra_memory(contest)
            return
        del contest, rounds
        if isinstance(memory_pool, str):
            benchmark.extra_info["memory_not_measured"] = memory_pool
        else:
            weigh = memory_pool.submit(extra_memory_of, make_contest, shape, dtype, used)
            benchmark.extra_info |= weigh.result()

    def run(*arguments):
        does_not_fit = None
        try:
            figures(*arguments)
        except torch.OutOfMemoryError as error:
            does_not_fit = ". ".join(str(error).split(". ")[:2])
            traceback.clear_frames(error.__traceback__)
        gc.collect()
        torch.cuda.empty_cache()
        if does_not_fit is not None:
            pytest.skip(does_not_fit)

    return run
