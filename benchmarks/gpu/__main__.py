"""`make gpu`: builds what there is to build, tests on the GPU, measures, and prints the tables.

All within ten minutes and without network or an environment of its own, so that it can run on a
machine that is lent for so long. `--dry-run` rehearses it on the CPU: kernels run in Triton's
interpreter, on tiny tensors, and the figures, which mean nothing, are kept only where `--results`
says so. It does not rehearse what only a GPU has: code for it, its tests (skipped), the sanitizers
(the ops run under none), and the benchmarks of the CUDA C++ kernels.

The CUDA C++ kernels are compiled for this GPU only; where there is no nvcc, those that were carried
here, see `make gpu-wheel`, run. Beside the tests their ops run under
compute-sanitizer; its last words go to `<machine>-sanitizer.txt`. They are measured first, without
the baselines, which take most of the time: `<machine>-native.json`, beside the figures of `auto`
and the baselines in `<machine>.json`.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.gpu import tests
from benchmarks.gpu.common import ROOT, finish, run, start

# The benchmarks are over after so many seconds, and none starts in the last of them.
SECONDS, LAST_BENCHMARK_SECONDS = 560, 40
# What precedes the benchmarks leaves them 140 s at least, their last ones included.
BUILD_SECONDS, INFO_SECONDS, TEST_SECONDS, REPORT_SECONDS = 150, 30, 240, 40
SANITIZERS = ("memcheck", "racecheck")


def device_name(dry_run: bool) -> str:
    if dry_run:
        return "rehearsal"
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU; make gpu DRY_RUN=1 rehearses without one")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())


def compile_for_this_gpu() -> None:
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}" + "a" * (major >= 9))
    # So that compute-sanitizer can name lines; the machine code is the same.
    os.environ.setdefault("NVCC_APPEND_FLAGS", "-lineinfo")


def is_carried() -> bool:
    """Whether the extension is of `make gpu-wheel`: there is one, and no nvcc. To build it here
    would leave CUDA out."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc", path=f"{CUDA_HOME}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    return nvcc is None and any(ROOT.glob("ppo_kernels/_C.*.so"))


def why_not_native(device: str) -> str | None:
    """To be asked when the extension is built."""
    from ppo_kernels import dispatch

    return dispatch.why_not("native", device)


def compute_sanitizer() -> str | None:
    """Where it is: on PATH or in the CUDA toolkit."""
    from torch.utils.cpp_extension import CUDA_HOME

    folders = [os.environ.get("PATH", "")]
    if CUDA_HOME is not None:
        folders += [f"{CUDA_HOME}/bin", f"{CUDA_HOME}/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


class Sanitized:
    """The native ops under each sanitizer, or under none in a rehearsal, beside what else runs."""

    def __init__(self, folder: Path, dry_run: bool):
        self.folder = folder
        self.processes = {}
        program = compute_sanitizer()
        if dry_run:
            self._start("no sanitizer")
        elif program is None:
            print("there is no compute-sanitizer: memory accesses and races are not checked")
        else:
            for tool in SANITIZERS:
                # Our kernels only, by their mangled namespace.
                options = (
                    "--tool",
                    tool,
                    "--kernel-name",
                    "kns=3ppo4cuda",
                    "--error-exitcode",
                    "86",
                )
                # Each tensor is an allocation of its own: an access behind one shows.
                alone = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
                self._start(tool, ("env", alone, program, *options))

    def _start(self, name: str, under: tuple = ()) -> None:
        output = self.folder / name
        self.processes[name] = start("-m", "tests.sanitized", under=under, output=output)

    def finish(self, seconds: float, kept: Path) -> list[int]:
        """The exit codes; writes the last lines to `kept`."""
        codes, lines = [], []
        end = time.monotonic() + seconds
        for name, process in self.processes.items():
            code = finish(process, max(0, end - time.monotonic()))
            text = (self.folder / name).read_text().strip()
            # Where the driver is behind a sandbox it can be; the kernels are not to blame. Its
            # summary would say that something was checked.
            if "Device not supported" in text and "ERROR SUMMARY" not in text:
                code, text = 0, "compute-sanitizer does not support this device, nothing is checked"
            if code != 0:
                print(text)
            # It takes bulk copies that an mbarrier guards across warps for hazards: to be read.
            codes.append(0 if name == "racecheck" else code)
            lines.append(f"{name}: exit code {code}: {text.rpartition(chr(10))[2]}")
            print(lines[-1], flush=True)
        if lines:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text("\n".join(lines) + "\n")
        return codes

    def stop(self) -> None:
        """What has not been finished."""
        for process in self.processes.values():
            if process.poll() is None:
                finish(process, 0)


def measure(results: Path, options: list[str], dry_run: bool) -> int:
    """0 if all steps end well. The benchmarks, called with `options`, write to `results`, those of
    the CUDA C++ kernels beside it."""
    end = time.monotonic() + SECONDS
    codes = []
    if dry_run or not is_carried():
        codes.append(run("setup.py", "--quiet", "build_ext", "--inplace", seconds=BUILD_SECONDS))
    codes.append(run("-m", "ppo_kernels", seconds=INFO_SECONDS))
    reason = why_not_native("cpu" if dry_run else "cuda")
    if reason is not None:
        print(f"the native kernels are neither checked nor measured: {reason}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sanitized = Sanitized(Path(folder), dry_run) if reason is None else None
        try:
            tests_end = time.monotonic() + TEST_SECONDS
            codes.append(run(*tests.command("both"), seconds=TEST_SECONDS))
            if sanitized is not None:
                kept = results.with_name(f"{results.stem}-sanitizer.txt")
                codes += sanitized.finish(tests_end - time.monotonic(), kept)
        finally:
            if sanitized is not None:
                sanitized.stop()

    runs = {results: []}
    if reason is None and not dry_run:
        native = results.with_name(f"{results.stem}-native.json")
        runs = {native: ["--backend", "native", "--no-baselines"]} | runs
    for i, (path, backend) in enumerate(runs.items()):
        # An equal share of what is left; the last has all that the others did not need.
        left = (end - time.monotonic()) / (len(runs) - i) - LAST_BENCHMARK_SECONDS
        codes.append(
            run(
                *("-m", "pytest", "benchmarks", "-q", "--benchmark-quiet", *options, *backend),
                *("--results", str(path), "--seconds", f"{left:.0f}"),
                seconds=left + LAST_BENCHMARK_SECONDS,
            )
        )
    written = [str(path) for path in runs if path.exists()]
    if written:
        codes.append(run("-m", "benchmarks.report", *written, seconds=REPORT_SECONDS))
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
    file = f"{device_name(args.dry_run)}.json"
    options = ["--rehearse"] if args.dry_run else ["--device", "cuda"]
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        compile_for_this_gpu()
    if args.peers is not None:
        options += ["--peers", str(Path(args.peers).resolve())]

    with tempfile.TemporaryDirectory() as dropped:
        default = Path(dropped) if args.dry_run else ROOT / "benchmarks" / "results"
        return measure((args.results or default).resolve() / file, options, args.dry_run)


if __name__ == "__main__":
    sys.exit(main())
