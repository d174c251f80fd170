"""The exact KL divergence of two logits tensors."""

import pytest
import torch

from benchmarks.harness import (
    CHECKED_ROWS,
    DTYPES,
    MORE_SHAPES,
    SHAPES,
    Contest,
    check_accuracy,
)
from ppo_kernels import kl_divergence, reference

compiled_reference = torch.compile(reference.kl_divergence, dynamic=False)


def make_kl(shape, dtype, device):
    logits = 2 * torch.randn(shape, device=device)
    ref_logits = (logits + 0.3 * torch.randn(shape, device=device)).to(dtype)
    logits = logits.to(dtype)
    baselines = {"eager": lambda: reference.kl_divergence(logits, ref_logits)}
    if shape in SHAPES:
        baselines["compile"] = lambda: compiled_reference(logits, ref_logits)

    def check():
        rows = logits[CHECKED_ROWS], ref_logits[CHECKED_ROWS]
        check_accuracy(
            "kl",
            kl_divergence(logits, ref_logits)[CHECKED_ROWS],
            reference.kl_divergence(*rows),
            reference.kl_divergence(*(x.double() for x in rows)),
        )

    return Contest(
        op=lambda: kl_divergence(logits, ref_logits),
        baselines=baselines,
        copied=logits,
        moved_bytes=logits.nbytes + ref_logits.nbytes,
        check=check,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=str)
def test_kl_divergence(measure, shape, dtype):
    measure("kl_divergence", make_kl, shape, dtype)
