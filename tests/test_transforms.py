"""torch.func: grad and vmap run on plain PyTorch, and what cannot says so."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import ppo_kernels
from tests.calls import NAMES, calls

# Of one process's ragged rows there is no batch; what is written in place has no transform.
BATCHED = [name for name in NAMES if "packed" not in name and "kept" not in name]
BATCHED.remove("ppo_loss_")
DIFFERENTIABLE = [name for name in NAMES if calls()[name].differentiable and name != "ppo_loss_"]


def _sum(results):
    return sum(x.sum() for x in tree_leaves(results) if x.requires_grad or x.ndim == 0)


def _loss(results):
    return results if isinstance(results, torch.Tensor) else results[0]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_grad_is_that_of_backward(name):
    call = calls()[name]
    leaves = {k: x.clone().requires_grad_() for k, x in call.differentiable.items()}
    expected = torch.autograd.grad(_loss(call(**leaves)).sum(), list(leaves.values()))
    grads = torch.func.grad(lambda x: _loss(call(**x)).sum())(call.differentiable)
    for x, y in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BATCHED)
def test_vmap_is_one_call_after_another(name):
    """Over all that may differ, and gradients of each."""
    call = calls()[name]
    tensors = call.differentiable | call.constants
    batch = {
        k: torch.stack([x, x.roll(1, 0), x.roll(1, 1)] if x.ndim > 1 else [x] * 3)
        for k, x in tensors.items()
    }
    results = torch.func.vmap(lambda x: call(**x))(batch)
    for i in range(3):
        expected = call(**{k: x[i] for k, x in batch.items()})
        of_one = tree_map(lambda x, i=i: x[i], results)
        for x, y in zip(tree_leaves(of_one), tree_leaves(expected), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_per_sample_gradients():
    """vmap of grad, over a head that all samples share."""
    call = calls()["linear_token_logprobs"]
    hidden, weight = call.differentiable["hidden"], call.differentiable["weight"]
    tokens = call.constants["tokens"]

    def loss(weight, hidden, tokens):
        return ppo_kernels.linear_token_logprobs(hidden, weight, tokens).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, hidden, tokens)
    for i in range(2):
        leaf = weight.clone().requires_grad_()
        loss(leaf, hidden[i], tokens[i]).backward()
        torch.testing.assert_close(grads[i], leaf.grad, rtol=1e-4, atol=1e-5)


def test_what_cannot_run_says_so():
    logits, tokens = torch.randn(3, 2, 5), torch.randint(5, (3, 2))
    per_token = torch.zeros(2), torch.ones(2)
    for function, message in (
        (
            lambda z, a: ppo_kernels.ppo_loss_(z, a, *per_token),
            "ppo_loss_ cannot run.*use ppo_loss",
        ),
        (
            lambda z, a: ppo_kernels.token_logprobs(z, a, backend="native"),
            "backend 'native' cannot run under torch.func transforms: reference can",
        ),
        (
            lambda z, a: ppo_kernels.vocab_parallel_ppo_loss(z, a, *per_token, vocab_start=0),
            r"vocab_parallel_\* ops cannot run under torch.func",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.func.vmap(function)(logits, tokens)
