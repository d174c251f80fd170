"""Every Triton kernel compiled for GPUs that are not here; its machine code judged on sm_90."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ppo_kernels
from tests.compiled import MEASURED, OPS, OTHERS, exponentials, measured, sweeps

# Ops that sweep a vocabulary -> their kernel, its loops that load logits, those that also store.
SWEEPS = {
    "token_logprobs": ("logprobs._forward", 1, 0),
    "token_logprobs_backward": ("logprobs._backward", 1, 1),
    "token_statistics": ("statistics._forward", 1, 0),
    "kl_divergence": ("kl._forward", 1, 0),
    "kl_divergence_backward": ("kl._backward", 1, 1),
    "ppo_loss": ("ppo_loss._ppo_loss", 1, 0),
    "ppo_loss_and_gradient": ("ppo_loss._ppo_loss", 2, 1),
    "ppo_loss_": ("ppo_loss._ppo_loss", 2, 1),
    "rescale_": ("ppo_loss._rescale", 1, 1),
}


def of_op(reports, op):
    return [x for x in reports if x["op"] == op]


def those_with(reports, *keys):
    """Of the reports where one of these is there and not 0: what was called, and these."""
    shown = ("dtype", "call", "target", "kernel", *keys)
    return [[x[k] for k in shown if k in x] for x in reports if any(x.get(k) for k in keys)]


def test_every_kernel_is_compiled(compiled):
    folder = Path(ppo_kernels.__file__).parent / "_triton"
    written = {
        f"{path.stem}.{node.name}"
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(x).startswith("kernel(") for x in node.decorator_list)
    }
    assert written
    assert written - {x["kernel"] for x in measured(compiled)} == set()


@pytest.mark.parametrize(
    "target", (MEASURED, *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS))
)
@pytest.mark.parametrize("op", OPS)
def test_compiles(compiled, op, target):
    """In each dtype, with and without optional inputs: NVIDIA's sm_80, sm_90, sm_100, and AMD."""
    reports = [x for x in of_op(compiled, op) if x["target"] == target]
    assert reports
    assert those_with(reports, "error") == []


@pytest.mark.parametrize("op", OPS)
def test_calls_that_differ_in_numbers_compile_nothing(compiled, op):
    """Temperature, clip, coefficients, estimator, rows, lengths, V of the same divisibility, and
    where tensors begin: the same code sums a row in the same order."""
    assert those_with(of_op(compiled, op), "recompiled") == []


@pytest.mark.parametrize("op", OPS)
def test_sass_of_no_kernel_spills(compiled, op):
    """A stack frame that nothing reads or writes, as LLVM leaves at times, costs nothing."""
    kernels = measured(of_op(compiled, op))
    assert kernels
    assert those_with(kernels, "spills") == []


def test_sass_shows_spills():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.compiled.spilling"],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(result.stdout)
    assert report["spills"] > 0
    assert report["stack"] > 0


@pytest.mark.parametrize("op", SWEEPS)
def test_sass_of_sweeps(compiled, op):
    """16 bytes to a load and to a store, one exponential to an element and a few to a block, and
    nothing that a thread waits for. Rows that are not aligned are read element by element."""
    kernel, loads, stores = SWEEPS[op]
    found = [
        x
        for x in measured(of_op(compiled, op))
        if x["kernel"] == kernel and x["dtype"] != "float64"
    ]
    assert {x["dtype"] for x in found} == {"float32", "bfloat16", "float16"}
    for x in found:
        assert len(sweeps(x)) == loads, x
        assert max(exponentials(x)) <= 1.25, x
        for key in ("exchanges", "from_shared", "to_shared"):
            assert [loop[key] for loop in sweeps(x)] == [0] * loads, x
        if "strided" not in x["call"]:
            assert {loop["narrowest_load"] for loop in sweeps(x)} == {128}, x
            assert sum(loop["narrowest_store"] == 128 for loop in sweeps(x)) == stores, x


def test_sass_of_sampling(compiled):
    """The sweep for the weights of segments as of others; only the walk in the one that is chosen
    has threads wait for each other."""
    found = of_op(compiled, "sample_tokens")
    found = [x for x in measured(found) if x["kernel"] == "sampling._unfiltered"]
    assert {x["dtype"] for x in found} == {"float32", "bfloat16", "float16", "float64"}
    for x in found:
        sweep, walk = sorted(sweeps(x), key=lambda loop: loop["exchanges"])
        assert sweep["exchanges"] == sweep["from_shared"] == 0 < walk["exchanges"], x
        assert sweep["narrowest_load"] == 128, x
        if x["dtype"] != "float64":
            assert exponentials(x)[sweeps(x).index(sweep)] <= 1.25, x
