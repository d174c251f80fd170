"""`make sanitize`: the C++ kernels for the CPU under AddressSanitizer and UBSan.

They are built with both in a copy of the sources, where the tests of the ops run, and calls with
arguments of all kinds. The first report ends it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import ROOT, build_folder

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1"
# Those of compilers for GPUs, of the peers and of the trainer watch other code.
OTHERS = ("cuda", "triton", "on_gpu", "setup", "report", "documents")
COPIED = ("ppo_kernels", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md")


def build(folder: Path) -> None:
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("_C.*", "__pycache__", "rlhf", "peers")
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copyfile(source, target)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"CFLAGS": FLAGS, "FORCE_CUDA": "0"}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def runtime(name: str) -> str:
    """Path of a library of the compiler's, which the process must load first."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    args = parser.parse_args()
    folder = build_folder("sanitized")
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtime(name) for name in ("asan", "ubsan", "stdc++")),
        # Python never frees what it keeps to its end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    files = sorted(path.name for path in (folder / "tests").glob("test_*.py"))
    files = [f"tests/{name}" for name in files if not any(x in name for x in OTHERS)]
    tests = ["pytest", "-q", "-p", "no:cacheprovider", "-k", "native and not emulated", *files]
    for command in (tests, ["tests.random_calls", "--calls", str(args.calls)]):
        status = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment)
        if status.returncode != 0:
            return status.returncode
    print("AddressSanitizer and UBSan have nothing to report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
