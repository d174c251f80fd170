"""The exact KL divergence of two logits tensors."""

import pytest
import torch

from benchmarks.harness import (
    COMPILED,
    DTYPES,
    MOST_EAGER_TOKENS,
    Contest,
    check_agreement,
    check_rows,
    checked,
)
from ppo_kernels import kl_divergence, reference

compiled_reference = torch.compile(reference.kl_divergence, dynamic=False)


def make_pair(shape, dtype, device):
    """Logits, and those of a reference not far from them."""
    logits = torch.randn(shape, dtype=dtype, device=device).mul_(2)
    ref_logits = torch.randn(shape, dtype=dtype, device=device).mul_(0.3).add_(logits)
    return logits, ref_logits


def make_kl(shape, dtype, setting):
    logits, ref_logits = make_pair(shape, dtype, setting.device)
    baselines = {}
    if shape[0] <= MOST_EAGER_TOKENS:
        baselines["eager"] = lambda: reference.kl_divergence(logits, ref_logits)
    if shape in COMPILED:
        baselines["compile"] = lambda: compiled_reference(logits, ref_logits)

    def op():
        return kl_divergence(logits, ref_logits, backend=setting.backend)

    def check():
        rows = checked(logits), checked(ref_logits)
        kl = op()
        check_rows(
            "kl",
            kl,
            reference.kl_divergence(*rows),
            reference.kl_divergence(*(x.double() for x in rows)),
            scale=1.0,
        )
        if "compile" in baselines:
            check_agreement(baselines["compile"](), kl)

    return Contest(
        op=op,
        baselines=baselines,
        copied=logits,
        moved_bytes=logits.nbytes + ref_logits.nbytes,
        check=check,
    )


def make_kl_backward(shape, dtype, setting):
    """The gradient alone; the graphs of plain PyTorch hold too much to be kept for that."""
    logits, ref_logits = make_pair(shape, dtype, setting.device)
    logits.requires_grad_()
    upstream = torch.randn(shape[0], device=setting.device)
    kl = kl_divergence(logits, ref_logits, backend=setting.backend)

    def op():
        return torch.autograd.grad(kl, logits, upstream, retain_graph=True)

    def check():
        (gradient,) = op()
        rows = []
        for dtype in (logits.dtype, torch.float64):
            leaf = checked(logits.detach()).to(dtype).requires_grad_()
            result = reference.kl_divergence(leaf, checked(ref_logits).to(dtype))
            rows += torch.autograd.grad(result, leaf, checked(upstream).to(result.dtype))
        check_rows("gradient", gradient, *rows)

    return Contest(
        op=op,
        baselines={},
        copied=logits,
        moved_bytes=2 * logits.nbytes + ref_logits.nbytes,
        check=check,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_divergence(measure, shape, dtype):
    measure("kl_divergence", make_kl, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_divergence_backward(measure, shape, dtype):
    measure("kl_divergence backward", make_kl_backward, shape, dtype)
