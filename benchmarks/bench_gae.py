"""Generalised advantage estimation, against the loop over tokens in Python and, on a GPU, against a
compiled scan."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Contest, check_accuracy, check_agreement
from ppo_kernels import gae, gae_packed, reference

FACTORS = {"gamma": 0.99, "lam": 0.95}
# The scan runs backwards: the last columns depend on no others, and the loop is slow.
CHECKED_COLUMNS = 2048
# Longer loops in Python are waited for in vain.
MOST_EAGER_COLUMNS = 2048


@torch.compile(dynamic=False)
def compiled_scan(rewards, values, *, gamma, lam):
    """Advantages and returns in log2(T) passes: each adds what lies twice as far ahead."""
    advantages = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    factor, step = gamma * lam, 1
    while step < rewards.shape[1]:
        advantages = advantages + factor * F.pad(advantages[:, step:], (0, step))
        factor, step = factor**2, 2 * step
    return advantages, advantages + values


def make_gae(shape, dtype, setting):
    rewards, values = torch.randn(2, *shape, device=setting.device).to(dtype)
    baselines = {}
    if shape[1] <= MOST_EAGER_COLUMNS:
        baselines["eager"] = lambda: reference.gae(rewards, values, **FACTORS)
    if setting.name != "cpu":
        baselines["compile"] = lambda: compiled_scan(rewards, values, **FACTORS)

    def op():
        return gae(rewards, values, **FACTORS, backend=setting.backend)

    def check():
        tail = [x[:, -CHECKED_COLUMNS:] for x in (rewards, values)]
        eager = reference.gae(*tail, **FACTORS)
        truth = reference.gae(*(x.double() for x in tail), **FACTORS)
        results = op()
        for name, got, *expected in zip(results._fields, results, eager, truth, strict=True):
            check_accuracy(name, got[:, -CHECKED_COLUMNS:], *expected)
        if "compile" in baselines:
            for x, y in zip(baselines["compile"](), results, strict=True):
                check_agreement(x, y)

    return Contest(
        op=op,
        baselines=baselines,
        copied=torch.stack([rewards, values]),
        moved_bytes=4 * rewards.nbytes,
        check=check,
    )


def make_gae_packed(shape, dtype, setting):
    """As many trajectories as `shape` has rows, of random lengths, `shape[1]` on average."""
    rows, mean_length = shape
    lengths = torch.randint(1, 2 * mean_length, (rows,), device=setting.device)
    ends = lengths.cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends])
    rewards, values = torch.randn(2, int(ends[-1]), device=setting.device).to(dtype)

    def op():
        return gae_packed(rewards, values, cu_seqlens, **FACTORS, backend=setting.backend)

    def check():
        start = max(int(ends[-2]), int(ends[-1]) - CHECKED_COLUMNS)
        last = [x[None, start:] for x in (rewards, values)]
        eager = reference.gae(*last, **FACTORS)
        truth = reference.gae(*(x.double() for x in last), **FACTORS)
        results = op()
        for name, got, *expected in zip(results._fields, results, eager, truth, strict=True):
            check_accuracy(name, got[None, start:], *expected)

    return Contest(
        op=op,
        baselines={},
        copied=torch.stack([rewards, values]),
        moved_bytes=4 * rewards.nbytes,
        check=check,
    )


def test_gae(measure, gae_shape):
    measure("gae", make_gae, gae_shape, torch.float32)


def test_gae_packed(measure, gae_shape):
    measure("gae_packed", make_gae_packed, gae_shape, torch.float32)
