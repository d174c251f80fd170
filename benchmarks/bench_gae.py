"""Generalised advantage estimation, against the loop over tokens in Python."""

import pytest
import torch

from benchmarks.harness import Contest, check_accuracy
from ppo_kernels import gae, reference

WIDE, LONG = (512, 2048), (16, 131072)
FACTORS = {"gamma": 0.99, "lam": 0.95}
# The scan runs backwards: the last columns depend on no others, and the loop is slow.
CHECKED_COLUMNS = 2048


def make_gae(shape, dtype, device):
    rewards, values = torch.randn(2, *shape, device=device).to(dtype)
    baselines = {}
    if shape == WIDE:
        baselines["eager"] = lambda: reference.gae(rewards, values, **FACTORS)

    def check():
        tail = [x[:, -CHECKED_COLUMNS:] for x in (rewards, values)]
        eager = reference.gae(*tail, **FACTORS)
        truth = reference.gae(*(x.double() for x in tail), **FACTORS)
        results = gae(rewards, values, **FACTORS)
        for name, got, *expected in zip(results._fields, results, eager, truth, strict=True):
            check_accuracy(name, got[:, -CHECKED_COLUMNS:], *expected)

    return Contest(
        op=lambda: gae(rewards, values, **FACTORS),
        baselines=baselines,
        copied=torch.stack([rewards, values]),
        moved_bytes=4 * rewards.nbytes,
        check=check,
    )


@pytest.mark.parametrize("shape", [WIDE, LONG], ids=str)
def test_gae(measure, shape):
    measure("gae", make_gae, shape, torch.float32)
