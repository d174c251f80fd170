"""`pytest benchmarks`: the fixtures that turn a Contest into figures."""

import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.harness import ROUNDS, Clock, Rounds, extra_memory, memory_process
from ppo_kernels import __version__, dispatch

# Figures are worth little where other work was running.
LOAD_BEFORE = round(os.getloadavg()[0], 1)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device to measure on: cpu or cuda")


def _processor():
    if not Path("/proc/cpuinfo").exists():
        return platform.processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    if "cpu family" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Say of the machine what explains the figures, and not whose it is."""
    device = torch.device(config.getoption("device"))
    info = dispatch.build_info()
    output_json["machine_info"] = {
        "processor": _processor(),
        "simd": info and info["simd"],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load before": LOAD_BEFORE,
        "torch": torch.__version__,
        "ppo_kernels": __version__,
    }


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def clock(device):
    return Clock(device)


@pytest.fixture(scope="session")
def memory_pool(tmp_path_factory):
    """The process that measures memory, or the reason why there is none."""
    try:
        pool = memory_process(tmp_path_factory.mktemp("peak_malloc"))
    except (OSError, subprocess.CalledProcessError) as error:
        yield str(error)
    else:
        with pool:
            yield pool


@pytest.fixture
def measure(benchmark, clock, device, memory_pool):
    """measure(op, make_contest, shape, dtype): check, time and weigh the contest."""

    def run(op, make_contest, shape, dtype):
        torch.manual_seed(0)
        contest = make_contest(shape, dtype, device)
        contest.check()
        rounds = Rounds(contest, clock)
        benchmark.group = op
        benchmark.pedantic(rounds.run_op, setup=rounds.prepare, rounds=ROUNDS)
        benchmark.extra_info |= {"op": op, "shape": list(shape), "dtype": str(dtype)[6:]}
        benchmark.extra_info |= rounds.figures()
        del contest, rounds
        if isinstance(memory_pool, str):
            benchmark.extra_info["memory_not_measured"] = memory_pool
        else:
            weigh = memory_pool.submit(extra_memory, make_contest, shape, dtype, device)
            benchmark.extra_info |= weigh.result()

    return run
