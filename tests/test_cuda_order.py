"""What CUDA C++ has no words for, in the code that nvcc makes of it: the instructions, and their
order. The emulator has stand-ins for them and one memory, and sees neither."""

import re
import subprocess

import pytest

from tests import ROOT
from tests.compiled import cuda, order
from tests.compiled.cuda import measured

FUNCTIONS = ROOT / "csrc" / "cuda" / "ptx.cuh"
KERNELS = ROOT / "tests" / "compiled" / "ptx.cu"
# Of the functions that order memory: what stands between the store and the load about them.
ORDERS = {
    "cluster_arrive": "barrier.cluster.arrive.relaxed",
    "cluster_wait": "barrier.cluster.wait.acquire",
    "fence_cluster": "fence.acq_rel.cluster",
    "barrier_init": "mbarrier.init.shared::cta.b64",
    "barriers_ready": "fence.mbarrier_init.release.cluster",
    "bulk_copy": "mbarrier.arrive.expect_tx.shared::cta.b64 "
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
    "barrier_wait": "mbarrier.try_wait.parity.shared::cta.b64",
    "load_acquire": "ld.acquire.gpu.global.u32 st.global.u32",  # of what it returns
    "spin_until": "ld.acquire.gpu.global.u32",
    "store_release": "st.release.gpu.global.u32",
    "load_vector": "ld.global.L1::no_allocate.v4.u32",
}
ON_OLDER = {"load_acquire", "spin_until", "store_release", "load_vector"}
# A line of their code.
COMPUTES = {
    "shared_memory": "mov.u32 %r, _ZN3ppo4cuda6memoryE;",
    "shared_address": "cvta.to.shared.u64",
    "in_cluster": "mapa.u64 %rd, %rd, %r;",
    "fast_exp2": "ex2.approx.ftz.f32 %f, %f;",
    "fast_exp2_of_double": "fma.rn.f64",
    "max_or_nan": "max.NaN.f32 %f, %f, %f;",
    "max_or_nan_of_doubles": "setp.nan.f64",
    "unpack_bfloat16": "shl.b32",
    "unpack_half": "cvt.f32.f16 %f, high;",
    "pack_bfloat16": "cvt.rn.bf16x2.f32 %r, %f, %f;",
    "pack_half": "cvt.rn.f16x2.f32 %r, %f, %f;",
    "max_of_packed_bfloat16": "max.bf16x2 %r, %r, %r;",
    "max_of_packed_half": "max.f16x2 %r, %r, %r;",
}
TARGETS = {"80": False, "90a": True, "100a": True}  # whether they have clusters and bulk copies
NEW = set(ORDERS) - ON_OLDER | {"in_cluster"}


@pytest.fixture(scope="module", params=TARGETS)
def ptx(request, tmp_path_factory):
    """(target, {function: its kernel}) of tests/compiled/ptx.cu."""
    home = cuda.cuda_home()
    if home is None:
        pytest.skip("there is no nvcc")
    if f"sm_{request.param}".rstrip("a") not in cuda.known_archs():
        pytest.skip(f"nvcc does not know sm_{request.param}")
    path = tmp_path_factory.mktemp("ptx") / "ptx.ptx"
    nvcc = cuda.command(home, "compute", request.param)
    subprocess.run([*nvcc, "-ptx", str(KERNELS), "-o", str(path)], check=True)
    found = order.bodies(path.read_text())
    return request.param, {name.removesuffix("_"): body for name, body in found.items()}


def lines(body):
    """Of a kernel's code, registers without their numbers."""
    text = re.sub(r"(%[a-z]+)\d+", r"\1", body)
    return [" ".join(x.split()) for x in text.splitlines()]


def test_every_function_has_a_kernel():
    names = set(re.findall(r"__forceinline__ [\w*]+ (\w+)\(", FUNCTIONS.read_text()))
    called = KERNELS.read_text()
    assert {x for x in names if not re.search(rf"\b{x}\(", called)} == set()


def test_functions_that_order_memory(ptx):
    """What was stored before is stored before, what is loaded after is loaded after: without that
    the first store would be dead and nothing be loaded."""
    target, kernels = ptx
    for name, instructions in ORDERS.items():
        there = TARGETS[target] or name in ON_OLDER
        told = order.of_ptx(kernels[name])
        between = f"{instructions} " if there else ""
        assert told.startswith(f"st.global.u32 {between}ld.global.u32 st.global.u32 "), name


def test_functions_that_compute(ptx):
    target, kernels = ptx
    for name, line in COMPUTES.items():
        if TARGETS[target] or name not in NEW:
            assert any(x.startswith(line) for x in lines(kernels[name])), name


def test_a_wait_goes_on_until_the_barrier_opens(ptx):
    target, kernels = ptx
    loop = r"^\s*([$\w]+):\s*$.*\.try_wait\..*\bbra\s+\1;"
    found = re.search(loop, kernels["barrier_wait"], re.MULTILINE | re.DOTALL)
    assert (found is not None) == TARGETS[target]


def test_older_devices_trap(ptx):
    target, kernels = ptx
    trap = {name for name, body in kernels.items() if "trap;" in lines(body)}
    assert trap == (set() if TARGETS[target] else NEW)
    assert set(kernels) == set(ORDERS) | set(COMPUTES)


def test_no_kernel_breaks_a_rule(cuda_compiled):
    found = [(x["kernel"], x["variant"], order.broken(x)) for x in measured(cuda_compiled)]
    assert [x for x in found if x[2]] == []


@pytest.mark.parametrize("rule", order.RULES, ids=lambda x: x.name)
def test_a_rule_has_kernels(cuda_compiled, rule):
    assert any(order.concerns(rule, x) for x in measured(cuda_compiled))


@pytest.mark.parametrize(
    "kernel, opcode",
    [
        ("gae.scan", "MEMBAR.ALL.GPU"),
        ("gae.scan", "CCTL.IVALL"),
        ("kl.forward", "UCGABAR_WAIT"),
        ("kl.forward", "MEMBAR.ALL.GPU"),
        ("logprobs.forward", "UCGABAR_ARV"),
        ("logprobs.forward", "UCGABAR_WAIT"),
        ("logprobs.forward", "MEMBAR.ALL.GPU"),
        ("logprobs.forward", "fence.acq_rel.cluster"),
        ("ppo_loss_with_gradient.with_gradient", "SYNCS.ARRIVE.TRANS64"),
        ("ppo_loss_with_gradient.with_gradient", "SYNCS.PHASECHK.TRANS64.TRYWAIT"),
        ("ppo_loss_with_gradient.with_gradient", "BAR.SYNC.DEFER_BLOCKING"),
        ("ppo_loss_with_gradient.with_gradient", "fence.mbarrier_init.release.cluster"),
    ],
)
def test_a_rule_is_broken_without(cuda_compiled, kernel, opcode):
    found = [x for x in measured(cuda_compiled) if x["kernel"] == kernel]
    found = [x for x in found if any(f"{opcode} " in told for told in x["order"].values())]
    assert found
    for x in found:
        less = {code: told.replace(f"{opcode} ", "") for code, told in x["order"].items()}
        # Without a barrier of all threads only what is copied in bulk goes wrong.
        if opcode != "BAR.SYNC.DEFER_BLOCKING" or "UBLKCP" in less["sass"]:
            assert order.broken(x | {"order": less}) != []
