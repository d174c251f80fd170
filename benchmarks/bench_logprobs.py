"""Log-probabilities and entropy from logits, and what the smallest call costs.

TRL takes part where it is importable.
"""

import importlib.util

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
from ppo_kernels import reference, token_logprobs, token_logprobs_and_entropy

compiled_reference = torch.compile(reference.token_logprobs_and_entropy, dynamic=False)


def _trl(logits, tokens):
    """What TRL's trainers call for the same two results."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return selective_log_softmax(logits, tokens), entropy_from_logits(logits)


def make_logprobs(shape, dtype, device):
    logits = (2 * torch.randn(shape, device=device)).to(dtype)
    tokens = torch.randint(shape[1], shape[:1], device=device)
    functions = {"eager": reference.token_logprobs_and_entropy}
    if shape in SHAPES:
        functions["compile"] = compiled_reference
    if importlib.util.find_spec("trl") is not None:
        functions["trl"] = _trl

    def check():
        results = token_logprobs_and_entropy(logits, tokens)
        rows, row_tokens = logits[CHECKED_ROWS], tokens[CHECKED_ROWS]
        eager = reference.token_logprobs_and_entropy(rows, row_tokens)
        truth = reference.token_logprobs_and_entropy(rows.double(), row_tokens)
        for name, got, *expected in zip(results._fields, results, eager, truth, strict=True):
            check_accuracy(name, got[CHECKED_ROWS], *expected)

    return Contest(
        op=lambda: token_logprobs_and_entropy(logits, tokens),
        baselines={name: lambda f=f: f(logits, tokens) for name, f in functions.items()},
        copied=logits,
        moved_bytes=logits.nbytes,
        check=check,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=str)
def test_token_logprobs_and_entropy(measure, shape, dtype):
    measure("token_logprobs_and_entropy", make_logprobs, shape, dtype)


def test_smallest_call(benchmark, device):
    """Two logits: all that is measured is the way there and back, with autograd's bookkeeping."""
    logits = torch.tensor([[0.0, 1.0]], device=device, requires_grad=True)
    tokens = torch.tensor([1], device=device)
    logprobs = token_logprobs(logits, tokens)
    expected = torch.log_softmax(logits, -1)[:, 1]
    torch.testing.assert_close(logprobs, expected)
    benchmark.extra_info |= {"op": "token_logprobs", "shape": [1, 2], "dtype": "float32"}
    benchmark(token_logprobs, logits, tokens)
