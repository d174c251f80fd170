"""Rows that a mask excludes: not read, with result and gradient 0."""

import math

import pytest
import torch

from ppo_kernels import (
    kl_divergence,
    kl_estimate,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    token_logprobs,
    token_logprobs_and_entropy,
    token_statistics,
)

# Transposed, as a mask of time-major data.
MASK = torch.tensor([[True, False], [False, True], [True, True], [False, False]]).t()


def _scored(function):
    def call(vocabulary):
        tokens, temperature = torch.randint(vocabulary, (2, 4)), 0.5 + torch.rand(2, 4)
        options = {"tokens": tokens, "temperature": temperature}
        return function, {"logits": torch.randn(2, 4, vocabulary)}, options

    return call


def _linear(function):
    def call(vocabulary):
        _, _, options = _scored(function)(vocabulary)
        weight, bias = torch.randn(vocabulary, 5), torch.randn(vocabulary)
        options |= {"weight": weight, "bias": bias, "chunk_bytes": 8 * vocabulary}
        return function, {"hidden": torch.randn(2, 4, 5)}, options

    return call


def _kl(vocabulary):
    options = {"ref_logits": torch.randn(2, 4, vocabulary), "temperature": 0.5 + torch.rand(2, 4)}
    return kl_divergence, {"logits": torch.randn(2, 4, vocabulary)}, options


def _estimate(vocabulary):
    inputs = {"logprobs": torch.randn(2, 4), "ref_logprobs": torch.randn(2, 4)}
    return kl_estimate, inputs, {"estimator": "k3"}


CALLS = {
    "token_logprobs": _scored(token_logprobs),
    "token_logprobs_and_entropy": _scored(token_logprobs_and_entropy),
    "token_statistics": _scored(token_statistics),
    "linear_token_logprobs": _linear(linear_token_logprobs),
    "linear_token_logprobs_and_entropy": _linear(linear_token_logprobs_and_entropy),
    "kl_divergence": _kl,
    "kl_estimate": _estimate,
}


def _excluded_are_garbage(arguments, mask):
    """NaN, and ids that no vocabulary has, wherever a row does not count."""
    spoilt = {}
    for name, x in arguments.items():
        per_row = isinstance(x, torch.Tensor) and x.shape[:2] == mask.shape
        if per_row:
            rows = ~mask if x.ndim == 2 else ~mask.unsqueeze(-1)
            x = x.masked_fill(rows, -(10**9) if name == "tokens" else math.nan)
        spoilt[name] = x
    return spoilt


def _run(function, inputs, options, upstream):
    """Results and gradients under a weighted sum of the results."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    results = function(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    differentiable = [x for x in results if x.requires_grad]
    torch.autograd.backward(differentiable, [upstream] * len(differentiable))
    return [x.detach() for x in results], [x.grad for x in leaves.values()]


@pytest.mark.parametrize("vocabulary", (11, 600))
@pytest.mark.parametrize("name", CALLS)
def test_excluded_rows_are_not_read_and_give_nothing(backend, name, vocabulary):
    """Nor does what comes back to them, an upstream gradient of NaN, matter."""
    function, inputs, options = CALLS[name](vocabulary)
    mask, options = MASK.to(torch.get_default_device()), options | {"backend": backend}
    upstream = torch.randn(2, 4)
    expected, expected_grads = _run(function, inputs, options, upstream * mask)
    got, grads = _run(
        function,
        _excluded_are_garbage(inputs, mask),
        _excluded_are_garbage(options, mask) | {"mask": mask},
        upstream.masked_fill(~mask, math.nan),
    )
    # Products of other rows beside them are rounded in another order.
    exactly = {"rtol": 1e-5, "atol": 1e-5} if "hidden" in inputs else {"rtol": 0, "atol": 0}
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x[mask], y[mask], **exactly)
        assert (x[~mask] == 0).all()
    if name == "token_statistics":
        return
    for x, y in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(x[mask], y[mask], rtol=1e-5, atol=1e-6)
        assert (x[~mask] == 0).all()


@pytest.mark.parametrize("name", CALLS)
def test_nothing_counts(backend, name):
    function, inputs, options = CALLS[name](11)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    options = _excluded_are_garbage(options | {"backend": backend}, mask) | {"mask": mask}
    inputs = _excluded_are_garbage(inputs, mask)
    results, grads = _run(function, inputs, options, torch.randn(2, 4))
    assert all((x == 0).all() for x in results)
    assert all((x == 0).all() for x in grads if x is not None)


@pytest.mark.parametrize("name", CALLS)
def test_a_mask_of_another_shape_is_named(name):
    function, inputs, options = CALLS[name](11)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 4\)"):
        function(**inputs, **options, mask=torch.ones(4, 2).bool())
