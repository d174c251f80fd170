"""The Triton backend compiled for GPUs that are not here, in processes beside the tests."""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from ppo_kernels import linear_chunks, schemas
from tests import cache_folder

# Ops with kernels of their own.
OPS = [op for op in schemas.SCHEMAS if op not in linear_chunks.OPS]
# The target whose code is measured, for every width.
MEASURED = "cuda:90"
OTHERS = "hip:gfx942", "cuda:80", "cuda:100"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


class Compilation:
    """Begun when it is made; `reports` waits for all that `tests.compiled.collect` prints. One
    process takes the target that is measured, and one the others, in turn. What was compiled before
    from the same sources is taken from the cache."""

    def __init__(self, targets):
        self._folder = tempfile.TemporaryDirectory(prefix="ppo_kernels-")
        shares = filter(None, ({MEASURED} & targets, sorted(targets - {MEASURED})))
        self._processes = [self._begin(i, share) for i, share in enumerate(shares)]
        self._reports = None

    def _path(self, i, name):
        return Path(self._folder.name, f"{i}-{name}")

    def _begin(self, i, targets):
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache_folder("triton"))}
        environment.pop("TRITON_INTERPRET", None)
        with open(self._path(i, "out"), "w") as out, open(self._path(i, "err"), "w") as err:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.compiled.collect", *targets],
                env=environment,
                cwd=Path(__file__).parents[2],
                stdout=out,
                stderr=err,
            )

    def reports(self):
        if self._reports is None:
            lines = []
            for i, process in enumerate(self._processes):
                if process.wait() != 0:
                    raise RuntimeError(self._path(i, "err").read_text())
                lines += self._path(i, "out").read_text().splitlines()
            self._reports = [json.loads(line) for line in lines]
        return self._reports

    def done(self):
        """Whether someone waited for the reports."""
        return self._reports is not None

    def end(self):
        for process in self._processes:
            process.terminate()
            process.wait()
        self._folder.cleanup()


def measured(reports):
    return [x for x in reports if x["target"] == MEASURED and "kernel" in x]


def sweeps(report):
    """Loops that load from a tensor, or what is kept of it in shared memory."""
    return [loop for loop in report["loops"] if loop["loaded"] or loop["from_shared"]]


def exponentials(report):
    """Of each sweep: `MUFU.EX2` per element loaded."""
    size = _BYTES[report["dtype"]]
    return [
        loop["exponentials"] * size / (loop["loaded"] + loop["from_shared"])
        for loop in sweeps(report)
    ]


def _span(numbers):
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}-{high}"


def table(reports):
    """Lines: a kernel and dtype each, over all variants of it."""
    groups = defaultdict(list)
    for x in measured(reports):
        groups[x["kernel"], x["dtype"]].append(x)
    heads = "kernel", "dtype", "variants", "registers", "spills", "EX2/element", "load", "store"
    rows = [heads]
    for (kernel, dtype), found in sorted(groups.items()):
        per_element = [x for report in found for x in exponentials(report)]
        rows.append(
            (
                kernel,
                dtype,
                str(len(found)),
                _span([x["registers"] for x in found]),
                _span([x["spills"] for x in found]),
                f"{max(per_element):.2f}" if any(per_element) else "-",
                _span([x["load"] for x in found]),
                _span([x["store"] for x in found]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
