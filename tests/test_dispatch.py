"""Which backend runs, and what is said when one cannot."""

import os
import subprocess
import sys

import pytest
import torch

import ppo_kernels
from ppo_kernels import dispatch, token_logprobs

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


def _run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


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
        simd = ppo_kernels.dispatch.build_info()["simd"]
        assert any(line.startswith(f"SIMD        {simd} (compiled:") for line in lines)


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


@pytest.mark.parametrize("name", ppo_kernels.__all__)
def test_public_names_are_there_and_documented(name):
    assert getattr(ppo_kernels, name).__doc__
