"""Which tests fail when one barrier, fence, arrival, wait, release or acquire is left out.

    nice python -m tests.emulator.mutations [FILE...]

Takes each place in csrc/cuda (in FILEs such as gae.cu, where they are named) where something
synchronises, and runs the tests that reach it on the emulator, which does nothing there. Where none
fails without a release or acquire, its file is compiled with a plain store or load for sm_90, and
must break a rule of `tests.compiled.order`. In ptx.cuh what orders memory is weakened in turn, and
`tests/test_cuda_order.py` must fail. Prints a line a place; exits with 1 if any survived.
"""

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ROOT, emulator, test_cuda_order
from tests.compiled import cuda, order

CUDA = ROOT / "csrc" / "cuda"
PTX = CUDA / "ptx.cuh"
# Functions that order something, and those of ptx.cuh that by themselves do not.
SYNCHRONISES = {
    *("__syncthreads", "__syncwarp", "cluster_arrive", "cluster_wait", "fence_cluster"),
    *("barrier_init", "barriers_ready", "barrier_wait", "load_acquire", "store_release"),
}
OTHERS = {
    *("shared_memory", "shared_address", "in_cluster", "bulk_copy", "load_vector"),
    "spin_until",
    *("fast_exp2", "max_or_nan", "unpack", "pack", "max_of_packed"),
}
# The emulator has one memory, which sees no difference.
RELEASES = {"load_acquire", "store_release"}
_CALL = re.compile(rf"\b({'|'.join(SYNCHRONISES)})\(")
# How code of ptx.cuh may be weaker: without an instruction, its order, or its scope.
_WEAKER = {
    r'"(barrier|fence|mbarrier|cp|st|ld|mapa|@!)\b[^"]*"': '""',
    r"\.(release|acquire)\.gpu\.": ".relaxed.gpu.",
    r"(?<=release|acquire)\.gpu\.": ".cta.",
    r"(?<=acq_rel)\.cluster;": ".cta;",
}
# Longest that the tests of a place may take, in seconds: some mutants wait for ever.
LIMIT = 900

_EMULATED = "tests/test_cuda_emulated.py::test_"


def _orders(*ops):
    return [f"{_EMULATED}no_op_depends_on_the_order_of_threads[{op}]" for op in ops]


_ROWS = [
    f"{_EMULATED}bits_depend_on_no_order_and_no_alignment[{device}-torch.float32]"
    for device in ("small", "smaller", "H200", "H200, code for sm_80")
]
# Of each file: tests that reach all its places.
TESTS = {
    "gae.cu": [
        *_orders("gae", "gae_packed", "discounted_sums"),
        f"{_EMULATED}chunks_of_a_trajectory_find_each_other",
    ],
    "logprobs.cuh": [*_ROWS, *_orders("kl_divergence")],
    "means.cuh": [f"{_EMULATED}sums_over_all_warps_of_several_blocks"],
    "ppo_loss_with_gradient.cu": _ROWS,
    "sampling.cu": [
        f"{_EMULATED}greedy_draws_of_the_only_token",
        *(f"{_EMULATED}draws_from_several_segments[{x}]" for x in ("none", "top_k")),
    ],
    "states.cuh": _ROWS,
}
TESTS |= {"gae.cuh": TESTS["gae.cu"], "sampling.cuh": TESTS["sampling.cu"]}
_OF_PTX = [
    f"tests/test_cuda_order.py::test_{name}[90a]"
    for name in (
        "functions_that_order_memory",
        "functions_that_compute",
        "a_wait_goes_on_until_the_barrier_opens",
    )
]


class Place(NamedTuple):
    path: Path
    line: int  # from 1
    call: str

    def __str__(self):
        return f"{self.path.name}:{self.line}"


def places(path):
    """Where a file calls what synchronises."""
    return [
        Place(path, number, call[1])
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for call in _CALL.finditer(line.partition("//")[0])
    ]


class FirstFailure:
    """A plugin of pytest: sends what the first test to fail says, or else what `end` returns."""

    def __init__(self, connection, begin, end):
        self.connection, self.begin, self.end = connection, begin, end

    def pytest_collection_finish(self):
        self.begin()

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            test = report.nodeid.partition("::test_")[2]
            self.connection.send(f"{test}: {message.splitlines()[0]}")

    def pytest_sessionfinish(self):
        self.connection.send(self.end())


def _run(connection, tests, begin, end):
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os.chdir(ROOT)
    pytest.main(
        ["-x", "-p", "no:cacheprovider", *tests], plugins=[FirstFailure(connection, begin, end)]
    )


def run(tests, begin, end):
    """What the first test to fail says, or else what `end` returns; in a process of its own."""
    context = multiprocessing.get_context("fork")  # what is loaded stays so
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, tests, begin, end))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LIMIT) else f"no end after {LIMIT} s"
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()


def _without(place):
    """The text of its file, plain stores and loads in the place of others."""
    lines = place.path.read_text().splitlines(keepends=True)
    line = lines[place.line - 1]
    before, _, after = line.partition(f"{place.call}(")
    depth, end = 1, 0
    while depth:
        depth += {"(": 1, ")": -1}.get(after[end], 0)
        end += 1
    target, _, value = after[: end - 1].rpartition(", ")
    plain = {"store_release": f"*({target}) = {value}", "load_acquire": f"*({after[: end - 1]})"}
    lines[place.line - 1] = before + plain.get(place.call, "(void)0") + after[end:]
    return "".join(lines)


def compiled_without(place):
    """A rule that the order of the machine code breaks, or None."""
    with tempfile.TemporaryDirectory(prefix="ppo_kernels-") as folder:
        shutil.copytree(ROOT / "csrc", Path(folder, "csrc"))
        copy = Path(folder, "csrc", "cuda", place.path.name)
        copy.write_text(_without(place))
        reports = cuda.compile_file(copy, cuda.MEASURED, Path(folder, "mutant.o"))
        if "error" in reports[0]:
            raise RuntimeError(f"{place} is needed to compile:\n{reports[0]['error']}")
        for report in cuda.measured(reports):
            for rule in order.broken(report):
                return f"{report['kernel']} for {cuda.MEASURED}: {rule}"


def emulated_without(place):
    """(whether a test fails, what it says or why it does not)."""
    device = emulator.load()
    tests = TESTS[place.path.name]
    said = run(tests, lambda: device.leave_out(str(place)), device.left_out)
    if isinstance(said, str):
        return True, said
    rule = compiled_without(place) if place.call in RELEASES else None
    return (True, rule) if rule else (False, f"was left out {said} times")


def weaker_statements():
    """(line, what, text) of ptx.cuh, weaker in one place each."""
    text = PTX.read_text()
    found = [(x, to) for pattern, to in _WEAKER.items() for x in re.finditer(pattern, text)]
    for x, weaker in sorted(found, key=lambda pair: pair[0].start()):
        line = text.count("\n", 0, x.start()) + 1
        what = " ".join(x[0].split())
        yield line, f"{what} -> {weaker}", text[: x.start()] + weaker + text[x.end() :]


def compiled_with(text):
    """What the first test to fail says where this is ptx.cuh, or None."""
    with tempfile.TemporaryDirectory(prefix="ppo_kernels-") as folder:
        for path, content in ((PTX, text), (test_cuda_order.KERNELS, None)):
            copy = Path(folder, path.relative_to(ROOT))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(content or path.read_text())

        def begin():
            test_cuda_order.KERNELS = copy

        return run(_OF_PTX, begin, lambda: None)


def table(names):
    """(place, what is left out, whether a test fails, what it says)."""
    for path in sorted(CUDA.glob("*.cu*")):
        if names and path.name not in names:
            continue
        if path == PTX:
            for line, what, text in weaker_statements():
                said = compiled_with(text)
                yield f"{path.name}:{line}", what, said is not None, said
        else:
            for place in places(path):
                yield str(place), place.call, *emulated_without(place)


def unknown():
    """Functions of ptx.cuh and files with places of which this module does not know what to do."""
    functions = set(re.findall(r"__forceinline__ [\w*]+ (\w+)\(", PTX.read_text()))
    files = {x.name for x in CUDA.glob("*.cu*") if x != PTX and places(x)}
    return (functions - SYNCHRONISES - OTHERS) | (files - set(TESTS))


def main(names):
    if missing := unknown():
        sys.exit(f"SYNCHRONISES, OTHERS or TESTS must have {', '.join(sorted(missing))}")
    count = survived = 0
    for place, what, killed, said in table(names):
        count, survived = count + 1, survived + (not killed)
        print(f"{place:32} {what[:48]:48} {'' if killed else 'SURVIVED: '}{said}", flush=True)
    print(f"{count} places, {survived} survived")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
