"""The CUDA C++ kernels compiled for GPUs that are not here, in a process beside the tests.

    python -m tests.compiled.cuda sm_90a sm_80 > kernels.jsonl

Every file of csrc/cuda is compiled with the flags of setup.py, with warnings as errors. What was
compiled before from the same sources is taken from the cache. A line of the output is a JSON object
for a "target": of a file its "object" or the "error", or of a kernel what it uses; for `MEASURED`
also what its machine code does.
"""

import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch

from tests import ROOT, cache_folder, setup_py
from tests.compiled import _span, exponentials, order, sass

MEASURED = "sm_90a"
OTHERS = "sm_80", "sm_100a"
# As GCC and nvcc see it; torch's headers are not ours.
WARNINGS = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
DTYPES = {"float": "float32", "BFloat16": "bfloat16", "Half": "float16", "double": "float64"}
MOST_THREADS = 1024  # of a kernel that does not say


def sources():
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def cuda_home():
    """The folder of the CUDA toolkit, None without nvcc."""
    folders = f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ.get('PATH', '')}"
    nvcc = shutil.which("nvcc", path=folders)
    return None if nvcc is None else Path(nvcc).parents[1]


def why_not():
    """Why nothing can be compiled here; None when it can."""
    if cuda_home() is None:
        return "there is no nvcc"
    if importlib.util.find_spec("triton") is None:
        return "Triton, whose nvdisasm reads machine code, is not installed"
    return None


def known_archs():
    """That nvcc can compile for."""
    return setup_py().nvcc_says(cuda_home(), "--list-gpu-code").split()


def command(home, kind, number):
    """nvcc and its flags, for code of this kind (`sm` or `compute`) for the GPUs of a number."""
    from torch.utils import cpp_extension

    setup = setup_py()
    return [
        f"{home}/bin/nvcc",
        *(flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)),
        f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET_VERSION}",
        *cpp_extension.COMMON_NVCC_FLAGS,
        *("-Xcompiler", "-fPIC", *setup.NVCC_FLAGS.split()),
        setup.gencode(kind, number),
        *("-Xptxas", "-v", *WARNINGS),
    ]


def of_target(home, target):
    """`command` for machine code."""
    return command(home, *target.split("_"))


def link(objects, target):
    """A shared object of compiled files and no others, as setup.py links it."""
    from torch.utils import cpp_extension

    folders = [flag for path in cpp_extension.library_paths() for flag in ("-L", path)]
    libraries = ["-lc10", "-ltorch_cpu", *setup_py().cuda_link_flags(cuda_home())]
    subprocess.run(
        ["c++", "-shared", *objects, *folders, *libraries, "-o", str(target)], check=True
    )


def _with_headers(path, found):
    """Adds to `found` a file and those of ours that it includes."""
    if path not in found and path.exists():
        found.add(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            _with_headers((path.parent / name).resolve(), found)
    return found


def _key(source, nvcc):
    """Of all that the result depends on; where torch is installed is not of that."""
    ours = (Path(x) for x in (__file__, sass.__file__, order.__file__))
    files = [*_with_headers(source, set()), *ours]
    flags = [flag for flag in nvcc if flag.startswith("-")]
    content = hashlib.sha256(" ".join([*flags, torch.__version__]).encode())
    for compiler in (nvcc[0], "c++"):
        content.update(subprocess.run([compiler, "--version"], capture_output=True).stdout)
    for path in sorted(files):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def _usage(log):
    """{mangled name: what `ptxas -v` says}."""
    found = {}
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            used = found[entry[1]] = {"stack": 0, "spills": 0, "shared": 0}
        elif "bytes stack frame" in line:  # of the entry, or of a function that it calls
            stack, stores, loads = map(int, re.findall(r"(\d+) bytes", line))
            used["stack"] += stack
            used["spills"] += stores + loads
        elif "registers" in line:
            used["registers"] = int(re.search(r"Used (\d+) registers", line)[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                used["shared"] = int(shared[1])
    return found


def _bounds(ptx):
    """{mangled name: the threads and CTAs of its __launch_bounds__}."""
    found = {}
    for name, head in re.findall(r"\.entry (\w+)\((.*?)^\{", ptx, re.MULTILINE | re.DOTALL):
        threads = re.search(r"\.(?:max|req)ntid ([\d, ]+)", head)
        ctas = re.search(r"\.minnctapersm (\d+)", head)
        found[name] = {
            "threads": math.prod(map(int, threads[1].split(","))) if threads else MOST_THREADS,
            "ctas": int(ctas[1]) if ctas else 1,
        }
    return found


def _machine_code(kept):
    """{mangled name: what the code does}, from what nvcc kept."""
    bodies = order.bodies(kept.with_suffix(".ptx").read_text())
    text = sass._tool("nvdisasm", "-c", str(kept.with_suffix(".cubin")))
    _, *parts = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", text, flags=re.MULTILINE)
    found = {}
    for name, code in zip(parts[::2], parts[1::2], strict=True):
        parsed = sass.parse(code)
        found[name] = {
            "local": parsed.spills,
            "load": parsed.load,
            "store": parsed.store,
            "bulk_loads": len(re.findall(r"\bUBLKCP\.S\.G\b", code)),
            "clocks": len(re.findall(r"\bSR_GLOBALTIMER", code)),
            "loops": [x._asdict() for x in parsed.loops],
            "order": {"sass": order.of_sass(code), "ptx": order.of_ptx(bodies[name])},
        }
    return found


def resident(registers, threads, shared):
    """CTAs that a multiprocessor of an H100 or an H200 holds at a time: 65,536 registers, given to
    warps by 256 and a quarter of the warps at a time, 228 KiB of shared memory, given by 128 bytes,
    of which a CTA takes another KiB, 2048 threads and 32 CTAs."""
    of_warp = math.ceil(registers * 32 / 256) * 256
    warps = 65_536 // of_warp // 4 * 4
    of_cta = math.ceil(shared / 128) * 128 + 1024
    return min(warps * 32 // threads, (228 << 10) // of_cta, 2048 // threads, 32)


def _names(mangled):
    """{mangled name: (name, template arguments)}."""
    result = subprocess.run(
        ["c++filt", "-p", *mangled], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for name, line in zip(mangled, result.splitlines(), strict=True):
        short = re.sub(r"\(anonymous namespace\)::|\bppo::|\bcuda::|\bc10::", "", line)
        short = re.sub(r"\((\w+)\)(\d)", r"\1 \2", short)
        plain, _, arguments = short.partition("<")
        found[name] = plain, arguments.removesuffix(">")
    return found


def compile_file(source, target, into, *options):
    """Reports of one file, whose object is written to `into`."""
    what = {"file": source.name, "target": target}
    nvcc = [*of_target(cuda_home(), target), *options]
    with tempfile.TemporaryDirectory(prefix="ppo_kernels-") as folder:
        arguments = [*nvcc, "--keep", "--keep-dir", folder, "-c", str(source), "-o", str(into)]
        result = subprocess.run(arguments, capture_output=True, text=True)
        log = result.stdout + result.stderr
        if result.returncode != 0:
            return [what | {"error": log}]
        usage = _usage(log)
        bounds = _bounds(Path(folder, f"{source.stem}.ptx").read_text())
        code = _machine_code(Path(folder, source.stem)) if usage and target == MEASURED else {}
    names = _names(sorted(usage))
    reports = [what | {"object": str(into)}]
    for mangled, used in usage.items():
        name, arguments = names[mangled]
        types = re.findall(rf"\b({'|'.join(DTYPES)})\b", arguments)
        report = what | {
            "kernel": f"{source.stem}.{name}",
            "variant": arguments,
            "dtype": DTYPES[types[0]] if types else "-",
        }
        reports.append(report | used | bounds[mangled] | code.get(mangled, {}))
    return reports


def cached(source, target, cache):
    """Reports of one file, compiled if it or what it includes has changed."""
    path = cache / f"{source.stem}-{_key(source, of_target(cuda_home(), target))}.json"
    if not path.exists() or not path.with_suffix(".o").exists():
        reports = compile_file(source, target, path.with_suffix(".o"))
        if any("error" in x for x in reports):
            return reports
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(reports))
        os.replace(beside, path)
    return json.loads(path.read_text())


class Compilation:
    """Begun when it is made; `reports` waits for all that this module prints."""

    def __init__(self, targets):
        known = [x for x in sorted(targets) if x.rstrip("a") in known_archs()]
        self._folder = tempfile.TemporaryDirectory(prefix="ppo_kernels-")
        self._out, self._err = (Path(self._folder.name, name) for name in ("out", "err"))
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.compiled.cuda", *known],
                cwd=ROOT,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self._reports = None

    def reports(self):
        if self._reports is None:
            if self._process.wait() != 0:
                raise RuntimeError(self._err.read_text())
            self._reports = [json.loads(line) for line in self._out.read_text().splitlines()]
        return self._reports

    def done(self):
        """Whether someone waited for the reports."""
        return self._reports is not None

    def end(self):
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # with nvcc
            self._process.wait()
        self._folder.cleanup()


def kernels(reports):
    return [x for x in reports if "kernel" in x]


def measured(reports):
    return [x for x in kernels(reports) if x["target"] == MEASURED]


def table(reports):
    """Lines: a kernel and dtype each, over all variants and targets of it."""
    groups = defaultdict(list)
    for x in kernels(reports):
        groups[x["kernel"], x["dtype"]].append(x)
    targets = sorted({x["target"] for x in kernels(reports)}, key=lambda x: int(x[3:].rstrip("a")))
    uses = ("threads", "ctas", "spills", "stack", "shared")
    does = ("load", "store", "bulk_loads")
    heads = "kernel", "dtype", "variants", *(f"registers {x}" for x in targets), *uses
    rows = [(*heads, "EX2/element", *(x.replace("_", " ") for x in does))]
    for (kernel, dtype), found in sorted(groups.items()):
        here = measured(found)
        per_element = [x for report in here if dtype != "-" for x in exponentials(report)]
        rows.append(
            (
                *(kernel, dtype, str(len(here))),
                *(_span([x["registers"] for x in found if x["target"] == y]) for y in targets),
                *(_span([x[key] for x in found]) for key in uses),
                f"{max(per_element):.2f}" if any(per_element) else "-",
                *(_span([x[key] for x in here]) for key in does),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def summary(reports):
    """Lines: what was compiled, and `table`."""
    counts = Counter(x["target"] for x in kernels(reports))
    files = {x["file"] for x in reports}
    compiled = ", ".join(f"{n} for {target}" for target, n in counts.items())
    lines = [f"{counts.total()} kernels of {len(files)} files compiled by nvcc: {compiled}"]
    return lines + (table(reports) if counts else [])


def main(targets):
    cache = cache_folder("cuda")
    # Another run of the tests may be compiling the same.
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for source in sources():
            for target in targets:
                for report in cached(source, target, cache):
                    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
