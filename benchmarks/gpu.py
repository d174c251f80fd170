"""`make gpu`: builds what there is to build, tests on the GPU, measures, and prints the table.

All within ten minutes and without network or an environment of its own, so that it can run on a
machine that is lent for so long. `--dry-run` rehearses it on the CPU: kernels run in Triton's
interpreter, on tiny tensors, and the figures, which mean nothing, go to a temporary folder.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

# Of these the tests get at most so many, the benchmarks the rest less what their last one may take.
SECONDS, TEST_SECONDS, LAST_BENCHMARK_SECONDS = 560, 240, 40
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
    try:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON"
    )
    parser.add_argument("--peers", help="folder from which trl and liger_kernel may be imported")
    args = parser.parse_args()
    end = time.monotonic() + SECONDS
    name = device_name(args.dry_run)
    os.environ["PYTHONUNBUFFERED"] = "1"
    where = ["--device", "cuda"]
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        args.results = Path(tempfile.mkdtemp())
        where = ["--rehearse"]
    results = (args.results / f"{name}.json").resolve()
    peers = [] if args.peers is None else ["--peers", str(Path(args.peers).resolve())]

    # Most of the tests' time goes into compiling kernels.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []

    codes = [
        run("setup.py", "--quiet", "build_ext", "--inplace", seconds=TEST_SECONDS),
        run("-m", "ppo_kernels", seconds=TEST_SECONDS),
        run("-m", "pytest", "tests", "-q", "-m", "gpu", *workers, seconds=TEST_SECONDS),
    ]
    left = end - time.monotonic() - LAST_BENCHMARK_SECONDS
    codes.append(
        run(
            *("-m", "pytest", "benchmarks", "-q", "--benchmark-quiet", *where, *peers),
            *("--results", str(results), "--seconds", f"{left:.0f}"),
            seconds=left + LAST_BENCHMARK_SECONDS,
        )
    )
    if results.exists():
        codes.append(run("-m", "benchmarks.report", str(results), seconds=TEST_SECONDS))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
