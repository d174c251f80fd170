"""Every SIMD level the processor has gives the numbers of the others, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppo_kernels import dispatch

# From the least to the most; the environment variable asks for at most this level.
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")

PARITY = """
import torch
from ppo_kernels import dispatch, gae, kl_divergence, ppo_loss_
from tests import test_kl
from tests.conftest import (
    DTYPES, assert_as_exact_as_eager, awkward_rows, likeliest, loss_inputs, ppo_loss_truth,
    run_ppo_loss, softmax_truth
)
from tests.test_ppo_loss import OPTIONS

print(dispatch.build_info()["simd"])
torch.manual_seed(0)
for dtype in DTYPES:
    for vocabulary in (7, 130, 20001):
        inputs, options = loss_inputs(3, 5, vocabulary, dtype), OPTIONS["all"] | {"denominator": 1}
        truth, grad_truth = ppo_loss_truth(**inputs, **options)
        eager, eager_grad = run_ppo_loss(ppo_loss_, inputs, **options, backend="reference")
        result, grad = run_ppo_loss(ppo_loss_, inputs, **options, backend="native")
        for ours, theirs, true in zip(
            (*result, grad), (*eager, eager_grad), (*truth, grad_truth), strict=True
        ):
            assert_as_exact_as_eager(ours, theirs, true, scale=15)
        rows = awkward_rows(vocabulary).to(dtype)
        tokens = likeliest(rows)
        upstream = {"old_logprobs": softmax_truth(rows, tokens, 1.0)[0], "entropy_coef": 0.1}
        arguments = {"logits": rows, "tokens": tokens, "advantages": torch.ones(len(rows))}
        arguments |= upstream | {"denominator": 1}
        eager, eager_grad = run_ppo_loss(ppo_loss_, arguments, backend="reference")
        result, grad = run_ppo_loss(ppo_loss_, arguments, backend="native")
        assert_as_exact_as_eager(grad, eager_grad, ppo_loss_truth(**arguments)[1])
        logits, ref_logits = torch.randn(2, 4, vocabulary).to(dtype)
        pair = [
            test_kl.value_and_gradient(
                lambda z: kl_divergence(z, ref_logits, backend=backend), logits
            )
            for backend in ("native", "reference")
        ]
        for ours, theirs, true in zip(*pair, test_kl.truth_of(logits, ref_logits, 1.0)):
            assert_as_exact_as_eager(ours, theirs, true)
    rewards, values = torch.randn(2, 3, 101).to(dtype)
    exact = gae(rewards.double(), values.double(), gamma=0.9, lam=0.9, backend="reference")
    native = gae(rewards, values, gamma=0.9, lam=0.9, backend="native")
    assert (native.advantages - exact.advantages).abs().max() < 1e-5
"""


def available():
    reason = dispatch.why_not("native", "cpu")
    if reason is not None:
        pytest.skip(reason)
    if "PPO_KERNELS_SIMD" in os.environ:
        pytest.skip("PPO_KERNELS_SIMD is set, which hides what the processor has")
    level = dispatch.build_info()["simd"]
    return LEVELS[: LEVELS.index(level) + 1]


@pytest.mark.parametrize("level", LEVELS)
def test_level_is_used_and_right(level):
    if level not in available():
        pytest.skip(f"the processor has no {level}")
    result = subprocess.run(
        [sys.executable, "-c", PARITY],
        env=os.environ | {"PPO_KERNELS_SIMD": level},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [level]


def test_processor_flags_and_level_agree():
    """torch's own detection is the other opinion."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        pytest.skip(f"torch reports {capability}, which says nothing of AVX")
    assert available()[-1].startswith(capability.lower())
