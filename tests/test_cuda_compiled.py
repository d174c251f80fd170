"""Every CUDA C++ kernel compiled for GPUs that are not here; its machine code judged on sm_90."""

import subprocess
import sys

import pytest
import torch

from ppo_kernels import dispatch
from ppo_kernels.__main__ import VOCABULARIES
from tests.compiled import OPS, cuda, exponentials, sweeps
from tests.compiled.cuda import kernels, measured

FILES = [path.name for path in cuda.sources()]
# Kernels that sweep a vocabulary: whether they write a tensor of its size too.
SWEEPS = {
    "kl.backward": True,
    "kl.forward": False,
    "logprobs.backward": True,
    "logprobs.forward": False,
    "ppo_loss.saved": False,
    "ppo_loss_with_gradient.with_gradient": True,
    "ppo_loss_with_gradient.rescale": True,
    "sampling.filtered": False,
    "sampling.unfiltered": False,
    "statistics.forward": False,
}
# Blocks of most threads that fit on a multiprocessor, where they are not three: these need more
# registers, for sums in fp64 and for what scores are compared with.
RESIDENT = {"sampling.filtered": 1, "sampling.unfiltered": 2}
# Writes aligned vectors wherever a row begins.
IN_VECTORS = "ppo_loss_with_gradient.with_gradient"
# In their template arguments: rows begin at multiples of 16 bytes; in place: they stay on chip.
ALIGNED, KEPT = "Layout 2", ", true"


def of(reports, file):
    return [x for x in reports if x["file"] == file]


def those_with(reports, *keys):
    """Of the reports where one of these is not 0: which kernel, and these."""
    shown = ("kernel", "variant", "target", *keys)
    return [[x[k] for k in shown] for x in reports if any(x[k] for k in keys)]


needs_nvcc = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))


def for_target(reports, target):
    if target.rstrip("a") not in cuda.known_archs():
        pytest.skip(f"nvcc does not know {target}")
    return [x for x in reports if x["target"] == target]


every_target = pytest.mark.parametrize(
    "target", (cuda.MEASURED, *(pytest.param(x, marks=pytest.mark.slow) for x in cuda.OTHERS))
)


@every_target
@pytest.mark.parametrize("file", FILES)
def test_compiles_without_warnings(cuda_compiled, file, target):
    found = of(for_target(cuda_compiled, target), file)
    assert found
    assert [x["error"] for x in found if "error" in x] == []


@every_target
@pytest.mark.parametrize("file", FILES)
def test_no_kernel_spills(cuda_compiled, file, target):
    """Nothing of a thread lies in memory, neither what registers had no room for nor an array."""
    reports = kernels(of(for_target(cuda_compiled, target), file))
    assert those_with(reports, "spills", "stack") == []
    assert those_with(measured(reports), "local") == []


def test_every_sweep_is_judged(cuda_compiled):
    assert {x["kernel"] for x in kernels(cuda_compiled) if "Layout" in x["variant"]} == set(SWEEPS)


@every_target
@pytest.mark.parametrize("kernel", SWEEPS)
def test_blocks_of_aligned_rows_fit_on_a_multiprocessor(cuda_compiled, kernel, target):
    """Three, of most threads each. The kernel says so, and ptxas keeps to it."""
    found = kernels(for_target(cuda_compiled, target))
    found = [x for x in found if x["kernel"] == kernel]
    found = [x for x in found if ALIGNED in x["variant"] and x["dtype"] != "float64"]
    assert {x["dtype"] for x in found} == {"float32", "bfloat16", "float16"}
    assert {(x["threads"], x["ctas"]) for x in found} == {(512, RESIDENT.get(kernel, 3))}


@pytest.mark.parametrize("kernel", SWEEPS)
def test_sass_of_sweeps(cuda_compiled, kernel):
    """An exponential to an element and a few to a block, and nothing that threads wait for each
    other at; of aligned rows 16 bytes to a load and to a store. Rows that stay on chip are copied
    there in bulk, and their gradient is written 16 bytes to a store wherever they begin."""
    found = [x for x in measured(cuda_compiled) if x["kernel"] == kernel]
    assert {x["dtype"] for x in found} == set(cuda.DTYPES.values())
    for x in found:
        assert sweeps(x), x
        assert {loop["exchanges"] for loop in sweeps(x)} == {0}, x
        if x["dtype"] != "float64":
            assert max(exponentials(x)) <= 1.25, x
        kept = x["variant"].endswith(KEPT)
        assert any(loop["from_shared"] for loop in x["loops"]) == kept, x
        assert (x["bulk_loads"] > 0) == kept, x
        widths = {loop["narrowest_store"] for loop in x["loops"]} - {0}
        if ALIGNED in x["variant"]:
            assert {loop["narrowest_load"] for loop in sweeps(x)} == {128}, x
        if ALIGNED in x["variant"] or kernel == IN_VECTORS:
            assert widths == ({128} if SWEEPS[kernel] else set()), x


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_parts_of_rows_fit_on_a_multiprocessor_of_an_h200(
    cuda_compiled, emulated, vocabulary, dtype
):
    """Three, so that one loads while others compute and store; of rows that begin anywhere two.
    Registers are those of the machine code, and shared memory is what the launcher asks for."""
    emulated.device()
    logits = torch.empty(0, vocabulary, dtype=dtype)
    _, threads, shared, kept, by_shared, _ = dispatch.kernels("native").row_division(logits)
    assert kept
    found = {
        x["variant"].split(", ")[1]: cuda.resident(x["registers"], threads, shared + x["shared"])
        for x in measured(cuda_compiled)
        if x["kernel"] == "ppo_loss_with_gradient.with_gradient"
        and x["variant"].endswith(KEPT)
        and f"torch.{x['dtype']}" == str(dtype)
    }
    if vocabulary % (16 // dtype.itemsize):
        assert found["Layout 0"] >= 3
    else:
        assert (found["Layout 1"], found["Layout 2"], by_shared) == (2, 3, 3)


def test_means_wait_for_many_loads_at_a_time(cuda_compiled):
    """Sixteen of a thread, also where there are few."""
    found = [x for x in measured(cuda_compiled) if x["kernel"].endswith(".mean_parts")]
    assert {x["dtype"] for x in found} == {"float32", "float64"}
    for x in found:
        size = 8 if "double" in x["variant"].split(", ")[1] else 4
        assert [loop["loaded"] for loop in sweeps(x)] == [16 * size], x


def test_shared_object_of_cuda_loads_without_it_and_has_every_op(cuda_compiled, tmp_path):
    """What setup.py links, less the C++ kernels, on a PyTorch that may be without CUDA."""
    found = for_target(cuda_compiled, cuda.MEASURED)
    objects = [x["object"] for x in found if "object" in x]
    assert len(objects) == len(FILES)
    library = tmp_path / "cuda.so"
    cuda.link(objects, library)
    # Without `_C`, which may have registered the same kernels.
    result = subprocess.run(
        [
            sys.executable,
            *("-W", "ignore", "-c"),
            "import sys; sys.modules['ppo_kernels._C'] = None\n"
            "import torch; from ppo_kernels import schemas\n"
            "torch.ops.load_library(sys.argv[1])\n"
            "namespace = schemas.NAMESPACE['native']\n"
            "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
            "print(*[x for x in schemas.SCHEMAS if has(f'{namespace}::{x}', 'CUDA')])",
            str(library),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == set(OPS)


@needs_nvcc
def test_a_kernel_that_spills_shows(tmp_path):
    source = tmp_path / "reverse.cu"
    source.write_text(
        "__global__ void __launch_bounds__(512, 2) reverse(const float* x, float* y, int n) {\n"
        "  float kept[100];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 100; ++i) kept[i] = x[i * 512 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 100; ++i) y[(99 - i) * n + threadIdx.x] = kept[i];\n"
        "}\n"
    )
    reports = kernels(cuda.compile_file(source, cuda.MEASURED, tmp_path / "reverse.o"))
    (x,) = reports
    assert (x["kernel"], x["threads"], x["ctas"]) == ("reverse.reverse", 512, 2)
    assert x["spills"] > 0 and x["stack"] > 0 and x["local"] > 0


@needs_nvcc
def test_spins_have_a_watchdog_in_a_build_for_tests_only(cuda_compiled, tmp_path):
    assert those_with(measured(cuda_compiled), "clocks") == []
    source = tmp_path / "spins.cu"
    source.write_text(
        f'#include "{cuda.ROOT}/csrc/cuda/ptx.cuh"\n'
        "using namespace ppo::cuda;\n"
        "__global__ void flag(const uint32_t* there) {\n"
        "  spin_until([&] { return load_acquire(there) != 0; });\n"
        "}\n"
        "__global__ void barrier() {\n"
        "  barrier_wait(reinterpret_cast<Barrier*>(shared_memory()));\n"
        "}\n"
    )
    for options, watched in ((), False), (("-DPPO_WATCHDOG",), True):
        reports = cuda.compile_file(source, cuda.MEASURED, tmp_path / "spins.o", *options)
        found = {x["kernel"]: x["clocks"] > 0 for x in measured(reports)}
        assert found == {"spins.flag": watched, "spins.barrier": watched}, reports


@needs_nvcc
def test_a_loop_that_waits_shows(tmp_path):
    source = tmp_path / "meet.cu"
    source.write_text(
        "__global__ void meet(const float* x, float* y, int n) {\n"
        "  extern __shared__ float kept[];\n"
        "  float sum = 0;\n"
        "#pragma unroll 1\n"
        "  for (int i = 0; i < n; i += 512) {\n"
        "    kept[threadIdx.x] = x[i + threadIdx.x];\n"
        "    __syncthreads();\n"
        "    sum += exp2f(__shfl_xor_sync(0xffffffff, kept[511 - threadIdx.x], 1));\n"
        "    __syncthreads();\n"
        "  }\n"
        "  y[threadIdx.x] = sum;\n"
        "}\n"
    )
    reports = kernels(cuda.compile_file(source, cuda.MEASURED, tmp_path / "meet.o"))
    (loop,) = measured(reports)[0]["loops"]
    assert loop["exchanges"] == 3 and loop["exponentials"] == 1
    assert loop["loaded"] == loop["from_shared"] == loop["to_shared"] == 4


@needs_nvcc
def test_a_warning_is_an_error(tmp_path):
    source = tmp_path / "unused.cu"
    source.write_text("int f(int x) {\n  int unused = 1;\n  return x;\n}\n")
    (report,) = cuda.compile_file(source, cuda.MEASURED, tmp_path / "unused.o")
    assert "unused" in report["error"]
