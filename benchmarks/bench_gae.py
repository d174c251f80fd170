"""Generalised advantage estimation, against the loop over tokens in Python and, on a GPU, against a
compiled scan.

Some rows are whole trajectories, some hold many, as those of environments that start again: with
one token in 50 done at random, 41 in a row of 2,048, and with one in 4, where nothing is left to a
kernel that runs from done to done. torchrl and PufferLib take part on the CPU where they are
importable.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Contest, check_accuracy, check_agreement
from ppo_kernels import gae, gae_packed, reference_gae

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


def make_gae(shape, dtype, setting, tokens_per_done=None):
    rewards, values = torch.randn(2, *shape, device=setting.device).to(dtype)
    dones, baselines = None, {}
    if tokens_per_done is not None:
        dones = torch.rand(shape, device=setting.device) * tokens_per_done < 1
    if shape[1] <= MOST_EAGER_COLUMNS:
        baselines["eager"] = lambda: reference_gae.gae(rewards, values, dones=dones, **FACTORS)
        baselines |= peers.gae(setting, rewards, values, dones, **FACTORS)
    if setting.name != "cpu" and dones is None:
        baselines["compile"] = lambda: compiled_scan(rewards, values, **FACTORS)

    def op():
        return gae(rewards, values, dones=dones, **FACTORS, backend=setting.backend)

    def check():
        tail = [None if x is None else x[:, -CHECKED_COLUMNS:] for x in (rewards, values, dones)]
        eager = reference_gae.gae(*tail[:2], dones=tail[2], **FACTORS)
        truth = reference_gae.gae(*(x.double() for x in tail[:2]), dones=tail[2], **FACTORS)
        results = op()
        for name, got, *expected in zip(results._fields, results, eager, truth, strict=True):
            check_accuracy(name, got[:, -CHECKED_COLUMNS:], *expected)
        for baseline in baselines.values():
            # PufferLib has advantages only.
            for x, y in zip(baseline(), results, strict=False):
                check_agreement(x, y)

    return Contest(
        op=op,
        baselines=baselines,
        copied=torch.stack([rewards, values]),
        moved_bytes=4 * rewards.nbytes + (0 if dones is None else dones.nbytes),
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
        eager = reference_gae.gae(*last, **FACTORS)
        truth = reference_gae.gae(*(x.double() for x in last), **FACTORS)
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


@pytest.mark.parametrize("tokens_per_done", [50, 4])
def test_gae_with_dones(measure, gae_shape, tokens_per_done):
    op = f"gae, 1 in {tokens_per_done} done"
    make = functools.partial(make_gae, tokens_per_done=tokens_per_done)
    measure(op, make, gae_shape, torch.float32)


def test_gae_packed(measure, gae_shape):
    measure("gae_packed", make_gae_packed, gae_shape, torch.float32)
