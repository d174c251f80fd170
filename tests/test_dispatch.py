"""Which backend runs, and what is said when one cannot."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ppo_kernels
from ppo_kernels import dispatch, token_logprobs
from tests.conftest import needs_native

LOGITS, TOKENS = torch.randn(2, 5), torch.tensor([1, 4])


def test_unknown_backend_is_named():
    with pytest.raises(
        ValueError, match="backend must be one of auto, reference, native, triton, got 'cuda'"
    ):
        token_logprobs(LOGITS, TOKENS, backend="cuda")


def test_named_backend_that_cannot_run_raises_with_the_reason(monkeypatch):
    monkeypatch.setitem(dispatch._MISSING, "native", "there is no compiler")
    with pytest.raises(RuntimeError, match="'native' cannot run: there is no compiler"):
        token_logprobs(LOGITS, TOKENS, backend="native")
    with pytest.raises(RuntimeError, match="it has no kernels for meta tensors"):
        monkeypatch.setitem(dispatch._MISSING, "native", None)
        token_logprobs(LOGITS.to("meta"), TOKENS.to("meta"), backend="native")


def test_auto_takes_the_native_backend_on_the_cpu(monkeypatch):
    if dispatch.why_not("native", "cpu") is None:
        assert dispatch.resolve("auto", LOGITS) == "native"
    assert dispatch.resolve("auto", LOGITS.to("meta")) == "reference"
    monkeypatch.setitem(dispatch._MISSING, "native", "not built")
    assert dispatch.resolve("auto", LOGITS) == "reference"
    expected = torch.log_softmax(LOGITS, -1).gather(-1, TOKENS[:, None])[:, 0]
    torch.testing.assert_close(token_logprobs(LOGITS, TOKENS), expected)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, archs): a GPU of that compute capability, and an extension for those."""
    dispatch._why_no_cuda.cache_clear()
    yield lambda capability, archs: (
        monkeypatch.setattr(dispatch, "build_info", lambda: {"cuda_archs": archs}),
        monkeypatch.setattr(torch.version, "cuda", "13.0"),
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True),
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability),
    )
    dispatch._why_no_cuda.cache_clear()


DEFAULT = ("sm_80", "sm_90a", "sm_100a", "compute_100")


@needs_native
@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    (
        ((8, 0), DEFAULT, True),
        ((8, 9), DEFAULT, True),
        ((9, 0), DEFAULT, True),
        ((10, 0), DEFAULT, True),
        ((10, 3), DEFAULT, True),
        ((12, 0), DEFAULT, True),
        ((7, 5), DEFAULT, False),
        ((9, 0), ("sm_80",), False),
        ((8, 0), ("sm_86",), False),
        ((10, 0), ("sm_90a",), False),
        ((10, 3), ("sm_100a",), False),
        ((10, 3), ("sm_100",), True),
        ((9, 0), ("compute_80",), True),
        ((12, 0), ("compute_90a",), False),
    ),
)
def test_native_runs_on_the_gpus_it_is_compiled_for(gpu, capability, archs, runs):
    gpu(capability, archs)
    reason = dispatch.why_not("native", "cuda")
    assert (reason is None) == runs
    if not runs:
        number = f"capability {capability[0]}.{capability[1]}"
        assert f"it is compiled for {', '.join(archs)}, none" in reason and number in reason


@needs_native
def test_native_without_cuda_sources_says_how_to_get_them(gpu):
    gpu((9, 0), ())
    reason = dispatch.why_not("native", "cuda")
    assert "built without CUDA sources" in reason
    assert "an nvcc of the same CUDA major version as torch" in reason and "FORCE_CUDA=1" in reason


@needs_native
def test_native_with_cuda_sources_on_a_torch_without_cuda(gpu, monkeypatch):
    gpu((9, 0), DEFAULT)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert dispatch.why_not("native", "cuda") == "this PyTorch is built without CUDA"


@needs_native
def test_auto_on_a_gpu_is_triton_then_native(gpu, monkeypatch):
    """Until a benchmark says otherwise; a GPU tensor that is not there stands for one that is."""
    gpu((9, 0), DEFAULT)
    with FakeTensorMode():
        x = torch.empty(2, 5, device="cuda")
    monkeypatch.setitem(dispatch._MISSING, "triton", None)
    assert dispatch.resolve("auto", x) == "triton"
    assert dispatch.resolve("native", x) == "native"
    monkeypatch.setitem(dispatch._MISSING, "triton", "Triton is not installed")
    assert dispatch.resolve("auto", x) == "native"
    gpu((7, 5), DEFAULT)
    dispatch._why_no_cuda.cache_clear()
    assert dispatch.resolve("auto", x) == "reference"
    with pytest.raises(RuntimeError, match=r"'native' cannot run: it is compiled for sm_80, "):
        dispatch.resolve("native", x)


def test_whether_native_runs_on_a_gpu_is_asked_once_and_not_traced(monkeypatch):
    asked = []

    def untraceable(index):
        asked.append(torch.ones(()).item())

    monkeypatch.setattr(dispatch, "_why_no_cuda", untraceable)
    monkeypatch.setitem(dispatch._MISSING, "native", None)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        return x + (dispatch.why_not("native", "cuda", x.device.index) is None)

    assert [step(torch.zeros(())), step(torch.ones(()))] == [1, 2]
    assert asked == [1]


def _run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_import_costs_little_beside_that_of_torch():
    """0.1 CPU seconds on a Zen 4; the quickest of three, for a busy machine is slower."""
    program = (
        "import sys, time, torch\n"
        "start = time.process_time()\n"
        "import ppo_kernels\n"
        "print(time.process_time() - start, 'torch._dynamo' in sys.modules)"
    )
    results = [_run("-c", program, TRITON_INTERPRET="0") for _ in range(3)]
    seconds, dynamo = min(x.stdout.split() for x in results)
    assert dynamo == "False"
    assert float(seconds) < 0.3


@needs_native
def test_one_extension_serves_every_python():
    extension = import_module("ppo_kernels._C")
    assert Path(extension.__file__).name == "_C.abi3.so"
    info = extension.build_info()
    assert {name: type(x) for name, x in info.items()} == {
        "compiler": str,
        "simd_compiled": tuple,
        "simd": str,
        "cuda_archs": tuple,
        "torch_target": str,
    }
    assert info["simd"] in info["simd_compiled"]


def test_report_names_versions_and_backends():
    result = _run("-m", "ppo_kernels")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f"ppo_kernels {ppo_kernels.__version__}" in lines
    assert f"torch       {torch.__version__}" in lines
    assert "reference   cpu: available" in lines
    reason = dispatch.why_not("native", "cpu")
    state = "available" if reason is None else f"missing: {reason}"
    assert f"native      cpu: {state}" in lines
    if reason is None:
        assert "auto        cpu: native" in lines
        info = dispatch.build_info()
        assert any(line.startswith(f"SIMD        {info['simd']} (compiled:") for line in lines)
        archs = ", ".join(info["cuda_archs"]) or "none compiled"
        assert f"CUDA archs  {archs}" in lines


def test_without_the_extension_everything_runs_on_reference_and_says_so():
    """What an installation without a compiler looks like."""
    result = _run(
        "-c",
        "import sys; sys.modules['ppo_kernels._C'] = None\n"
        "import torch, ppo_kernels, ppo_kernels.__main__ as main\n"
        "x = ppo_kernels.token_logprobs(torch.zeros(1, 4), torch.tensor([2]))\n"
        "assert abs(x.item() + torch.tensor(4.0).log().item()) < 1e-6\n"
        "print(main.report())",
    )
    assert result.returncode == 0, result.stderr
    assert "no native backend, ops run on plain PyTorch" in result.stderr
    assert "native      cpu: missing: the C++ extension ppo_kernels._C" in result.stdout
    assert "auto        cpu: reference" in result.stdout


# A torch for CUDA, with a GPU or not, and an extension of those archs; what then runs, and what the
# report says.
_FAKE_CUDA = """
import sys, types, torch
gpu, archs, triton = {gpu}, {archs}, {triton}
info = dict(cuda_archs=archs, simd="-", simd_compiled=[], compiler="-", torch_target="-")
sys.modules["ppo_kernels._C"] = types.ModuleType("ppo_kernels._C")
sys.modules["ppo_kernels._C"].build_info = lambda: info
sys.modules["ppo_kernels._triton"] = types.ModuleType("ppo_kernels._triton") if triton else None
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: gpu
from ppo_kernels import __main__ as main
if not gpu:
    print(main.report())
"""


@pytest.mark.parametrize("archs", ((), DEFAULT))
def test_report_says_why_a_gpu_is_not_used(archs):
    result = _run("-c", _FAKE_CUDA.format(gpu=False, archs=archs, triton=True))
    assert result.returncode == 0, result.stderr
    reason = "PyTorch finds no GPU" if archs else "it is built without CUDA sources"
    assert f"native      cuda: missing: {reason}" in result.stdout
    assert "triton      cuda: missing: PyTorch finds no GPU" in result.stdout
    assert "auto        cuda" not in result.stdout


@pytest.mark.parametrize("archs", ((), DEFAULT))
def test_without_triton_a_gpu_is_slow_only_if_native_is_not_for_it_either(archs):
    result = _run("-c", _FAKE_CUDA.format(gpu=True, archs=archs, triton=False))
    assert result.returncode == 0, result.stderr
    warned = "no triton backend, ops run on plain PyTorch, many times slower on the GPU"
    assert (warned in result.stderr) == (not archs)


@pytest.mark.parametrize("name", ppo_kernels.__all__)
def test_public_names_are_there_and_documented(name):
    assert getattr(ppo_kernels, name).__doc__
