"""Log-probabilities and entropy from logits, and what the smallest call costs.

TRL and Liger take part where they are importable.
"""

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import (
    COMPILED,
    DTYPES,
    MOST_EAGER_TOKENS,
    Contest,
    check_agreement,
    check_rows,
    checked,
)
from ppo_kernels import reference, token_logprobs, token_logprobs_and_entropy

compiled_reference = torch.compile(reference.token_logprobs_and_entropy, dynamic=False)


class Batch:
    """Logits and tokens, the functions of them that compete, and upstream gradients."""

    def __init__(self, shape, dtype, setting):
        device, backend = setting.device, setting.backend
        self.logits = torch.randn(shape, dtype=dtype, device=device).mul_(2)
        self.tokens = torch.randint(shape[1], shape[:1], device=device)
        self.op = lambda z, a: token_logprobs_and_entropy(z, a, backend=backend)
        self.others = {}
        if shape[0] <= MOST_EAGER_TOKENS:
            self.others = {"eager": reference.token_logprobs_and_entropy}
            self.others |= peers.logprobs(setting)
        if shape in COMPILED:
            self.others["compile"] = compiled_reference
        self.grads = torch.randn(2, shape[0], device=device).unbind()

    def check(self, results):
        """Results on some rows, then those of the others."""
        rows, row_tokens = checked(self.logits), checked(self.tokens)
        eager = reference.token_logprobs_and_entropy(rows, row_tokens)
        truth = reference.token_logprobs_and_entropy(rows.double(), row_tokens)
        for name, got, *expected in zip(results._fields, results, eager, truth, strict=True):
            check_rows(name, got, *expected)
        for function in self.others.values():
            for x, y in zip(function(self.logits, self.tokens), results, strict=False):
                check_agreement(x, y)


def make_logprobs(shape, dtype, setting):
    batch = Batch(shape, dtype, setting)
    arguments = batch.logits, batch.tokens
    return Contest(
        op=lambda: batch.op(*arguments),
        baselines={name: lambda f=f: f(*arguments) for name, f in batch.others.items()},
        copied=batch.logits,
        moved_bytes=batch.logits.nbytes,
        check=lambda: batch.check(batch.op(*arguments)),
    )


def make_logprobs_backward(shape, dtype, setting):
    """The gradient of both results. The graphs of eager and compiled PyTorch hold too much to be
    kept for a backward alone: TRL only takes part."""
    batch = Batch(shape, dtype, setting)
    leaf = batch.logits.requires_grad_()

    def backward(function):
        results = function(leaf, batch.tokens)
        return lambda: torch.autograd.grad(results, leaf, batch.grads, retain_graph=True)

    op = backward(batch.op)
    baselines = {name: backward(f) for name, f in batch.others.items() if name == "trl"}

    def check():
        (gradient,) = op()
        rows = []
        for dtype in (leaf.dtype, torch.float64):
            logits = checked(leaf.detach()).to(dtype).requires_grad_()
            results = reference.token_logprobs_and_entropy(logits, checked(batch.tokens))
            upstream = [checked(grad).to(results[0].dtype) for grad in batch.grads]
            rows += torch.autograd.grad(results, logits, upstream)
        check_rows("gradient", gradient, *rows)
        for baseline in baselines.values():
            check_agreement(checked(*baseline()), checked(gradient))

    return Contest(
        op=op,
        baselines=baselines,
        copied=leaf,
        moved_bytes=2 * leaf.nbytes,
        check=check,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logprobs_and_entropy(measure, shape, dtype):
    measure("token_logprobs_and_entropy", make_logprobs, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logprobs_and_entropy_backward(measure, shape, dtype):
    measure("token_logprobs_and_entropy backward", make_logprobs_backward, shape, dtype)


def test_smallest_call(benchmark, setting):
    """Two logits: all that is measured is the way there and back, with autograd's bookkeeping."""
    logits = torch.tensor([[0.0, 1.0]], device=setting.device, requires_grad=True)
    tokens = torch.tensor([1], device=setting.device)
    logprobs = token_logprobs(logits, tokens, backend=setting.backend)
    expected = torch.log_softmax(logits, -1)[:, 1]
    torch.testing.assert_close(logprobs, expected)
    benchmark.extra_info |= {"op": "token_logprobs", "shape": [1, 2], "dtype": "float32"}
    benchmark(token_logprobs, logits, tokens, backend=setting.backend)
