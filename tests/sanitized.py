"""Calls every native op on small shapes, for compute-sanitizer to watch: `make gpu`.

    compute-sanitizer --tool memcheck python -m tests.sanitized

On a GPU where there is one. Values are tested elsewhere.
"""

import sys

import torch
from torch.autograd.graph import save_on_cpu

from ppo_kernels import (
    dispatch,
    gae,
    gae_packed,
    kl_divergence,
    ppo_loss,
    ppo_loss_,
    sample_tokens,
    token_logprobs_and_entropy,
    token_statistics,
)
from tests.conftest import loss_inputs
from tests.test_registered_ops import _samples

# Rows that are not aligned, that one block holds, that it takes more to hold, and too long ones.
VOCABULARIES = (7, 1031, 32_000, 50_257, 151_936, 262_144)
NATIVE = {"backend": "native"}


def call_each_op():
    """As little as there is to an op, in each combination of inputs that `opcheck` takes."""
    for name, calls in _samples("native").items():
        for arguments in calls:
            getattr(dispatch.kernels("native"), name)(*arguments)


def sweep(vocabulary, dtype):
    """Forward and backward of what reads logits, of whole rows and of `x[:, :-1]`."""
    inputs = loss_inputs(2, 2, vocabulary, dtype)
    whole = torch.randn(2, 3, vocabulary).to(dtype)
    for logits in (inputs["logits"], whole[:, :-1]):
        leaf = logits.detach().requires_grad_()
        per_token = token_logprobs_and_entropy(leaf, inputs["tokens"], **NATIVE)
        token_statistics(logits, inputs["tokens"], **NATIVE)
        uniforms = torch.rand(2, 2)
        for filters in ({}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}):
            sample_tokens(logits, uniforms, temperature=0.7, **filters, **NATIVE)
        kl = kl_divergence(leaf, inputs["logits"], **NATIVE)
        loss = ppo_loss(**(inputs | {"logits": leaf}), **NATIVE).loss
        torch.autograd.grad(sum(per_token).sum() + kl.sum() + loss, leaf)
        with save_on_cpu():
            torch.autograd.grad(ppo_loss(**(inputs | {"logits": leaf}), **NATIVE).loss, leaf)
        in_place = logits.detach().clone() if logits.is_contiguous() else logits
        ppo_loss_(**(inputs | {"logits": in_place}), **NATIVE)


def scan(length):
    """Advantages of rows and of packed trajectories, one of them empty."""
    rewards, values = torch.randn(2, 3, length)
    factors = {"gamma": 0.99, "lam": 0.95}
    gae(rewards, values, **factors, **NATIVE)
    ends = torch.tensor([0, length, length, 3 * length])
    gae_packed(rewards.flatten(), values.flatten(), ends, **factors, **NATIVE)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = dispatch.why_not("native", device)
    if reason is not None:
        sys.exit(f"native cannot run: {reason}")
    torch.manual_seed(0)
    torch.set_default_device(device)
    call_each_op()
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            sweep(vocabulary, dtype)
    for length in (1, 100, 5000):
        scan(length)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
