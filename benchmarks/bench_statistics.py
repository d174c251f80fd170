"""Six statistics of a token and its distribution from one sweep, against the two of
`token_logprobs_and_entropy`."""

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
from ppo_kernels import reference, token_logprobs_and_entropy, token_statistics

compiled_reference = torch.compile(reference.token_statistics, dynamic=False)


def make_statistics(shape, dtype, setting):
    device, backend = setting.device, setting.backend
    logits = torch.randn(shape, dtype=dtype, device=device).mul_(2)
    tokens = torch.randint(shape[1], shape[:1], device=device)
    others = {"logprobs": lambda z, a: token_logprobs_and_entropy(z, a, backend=backend)}
    if shape[0] <= MOST_EAGER_TOKENS:
        others["eager"] = reference.token_statistics
    if shape in COMPILED:
        others["compile"] = compiled_reference

    def op():
        return token_statistics(logits, tokens, backend=backend)

    def check():
        results, rows, row_tokens = op(), checked(logits), checked(tokens)
        eager = reference.token_statistics(rows, row_tokens)
        truth = reference.token_statistics(rows.double(), row_tokens)
        for name, got, *expected in zip(results._fields, results, eager, truth, strict=True):
            if name == "top1":
                assert torch.equal(checked(got), expected[1])
            else:
                # The varentropy is a difference of terms of the size of the entropy's square.
                scale = truth[1].square().max().item() if name == "varentropy" else 0.0
                check_rows(name, got, *expected, scale=scale)
        for function in others.values():
            for x, y in zip(function(logits, tokens), results, strict=False):
                check_agreement(x, y.float())  # top1 is bool

    return Contest(
        op=op,
        baselines={name: lambda f=f: f(logits, tokens) for name, f in others.items()},
        copied=logits,
        moved_bytes=logits.nbytes,
        check=check,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_statistics(measure, shape, dtype):
    measure("token_statistics", make_statistics, shape, dtype)
