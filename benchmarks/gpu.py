"""`make gpu`: builds what there is to build, tests on the GPU, measures, and prints the table.

All within ten minutes and without network or an environment of its own, so that it can run on a
machine that is lent for so long. `--dry-run` rehearses it on the CPU: kernels run in Triton's
interpreter, on tiny tensors, and the figures, which mean nothing, are kept only where `--results`
says so.
"""

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

# The benchmarks are over after so many seconds, and none starts in the last of them.
SECONDS, LAST_BENCHMARK_SECONDS = 560, 40
# What precedes the benchmarks leaves them 100 s at least.
BUILD_SECONDS, INFO_SECONDS, TEST_SECONDS, REPORT_SECONDS = 120, 60, 240, 40
ROOT = Path(__file__).parents[1]


def device_name(dry_run: bool) -> str:
    if dry_run:
        return "rehearsal"
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU; make gpu DRY_RUN=1 rehearses without one")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())


def run(*arguments: str, seconds: float) -> int:
    """The exit code of `python ARGUMENTS` in the repository, 124 if it had to be stopped."""
    print("$ python", *arguments, flush=True)
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
            process.wait()


def measure(results: Path, options: list[str]) -> int:
    """0 if all steps end well. The benchmarks, called with `options`, write to `results`."""
    end = time.monotonic() + SECONDS
    # Most of the tests' time goes into compiling kernels.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []

    codes = [
        run("setup.py", "--quiet", "build_ext", "--inplace", seconds=BUILD_SECONDS),
        run("-m", "ppo_kernels", seconds=INFO_SECONDS),
        run("-m", "pytest", "tests", "-q", "-m", "gpu", *workers, seconds=TEST_SECONDS),
    ]
    left = end - time.monotonic() - LAST_BENCHMARK_SECONDS
    codes.append(
        run(
            *("-m", "pytest", "benchmarks", "-q", "--benchmark-quiet", *options),
            *("--results", str(results), "--seconds", f"{left:.0f}"),
            seconds=left + LAST_BENCHMARK_SECONDS,
        )
    )
    if results.exists():
        codes.append(run("-m", "benchmarks.report", str(results), seconds=REPORT_SECONDS))
    return int(any(codes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    parser.add_argument(
        "--results", type=Path, help="folder of the JSON, benchmarks/results if this is no dry run"
    )
    parser.add_argument("--peers", help="folder from which trl and liger_kernel may be imported")
    args = parser.parse_args()
    os.environ["PYTHONUNBUFFERED"] = "1"
    options = ["--rehearse"] if args.dry_run else ["--device", "cuda"]
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    if args.peers is not None:
        options += ["--peers", str(Path(args.peers).resolve())]
    file = f"{device_name(args.dry_run)}.json"

    with tempfile.TemporaryDirectory() as dropped:
        default = Path(dropped) if args.dry_run else ROOT / "benchmarks" / "results"
        return measure((args.results or default).resolve() / file, options)


if __name__ == "__main__":
    sys.exit(main())
