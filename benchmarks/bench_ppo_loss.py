"""The PPO loss from logits with its gradient: to a new tensor, and in place."""

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
from ppo_kernels import ppo_loss, ppo_loss_, reference, token_logprobs

ENTROPY_COEF = 0.01

compiled_reference = torch.compile(reference.ppo_loss, dynamic=False)


class Batch:
    """Logits and the rest of a loss's arguments. Every row has a gradient: the kernels skip those
    without, and the entropy bonus is there so that none is."""

    def __init__(self, shape, dtype, device):
        self.logits = (2 * torch.randn(shape, device=device)).to(dtype)
        self.tokens = torch.randint(shape[1], shape[:1], device=device)
        logprobs = token_logprobs(self.logits, self.tokens)
        self.old_logprobs = logprobs + 0.1 * torch.randn_like(logprobs)
        self.advantages = torch.randn_like(logprobs)

    def loss(self, function, logits):
        return function(
            logits, self.tokens, self.old_logprobs, self.advantages, entropy_coef=ENTROPY_COEF
        )

    def loss_and_gradient(self, function):
        """The results of a loss that is differentiated, and its gradient in the logits."""
        leaf = self.logits.detach().requires_grad_()
        results = self.loss(function, leaf)
        return results, *torch.autograd.grad(results[0], leaf)

    def baselines(self):
        functions = {"eager": reference.ppo_loss}
        if self.logits.shape in SHAPES:
            functions["compile"] = compiled_reference
        return {name: lambda f=f: self.loss_and_gradient(f) for name, f in functions.items()}

    def check(self, results, gradient):
        """Gradient and per-token results on some rows, then the loss that follows from the latter
        on all."""
        got = (results.logprobs, results.token_entropy, gradient)
        eager, truth = (self._rows(dtype) for dtype in (self.logits.dtype, torch.float64))
        names = ("logprobs", "token_entropy", "gradient")
        for name, x, *expected in zip(names, got, eager, truth, strict=True):
            check_accuracy(name, x[CHECKED_ROWS], *expected)

        per_token = (results.logprobs.double(), self.old_logprobs.double(), self.advantages)
        policy_loss, *_ = reference.clipped_policy_loss(*per_token)
        loss = policy_loss - ENTROPY_COEF * results.token_entropy.double().mean()
        torch.testing.assert_close(results.loss, loss.float())

    def _rows(self, dtype):
        rows = self.logits[CHECKED_ROWS].to(dtype).requires_grad_()
        loss, *_, logprobs, token_entropy = reference.ppo_loss(
            rows,
            self.tokens[CHECKED_ROWS],
            self.old_logprobs[CHECKED_ROWS],
            self.advantages[CHECKED_ROWS],
            entropy_coef=ENTROPY_COEF,
            denominator=self.tokens.numel(),
        )
        return logprobs, token_entropy, *torch.autograd.grad(loss, rows)


def make_ppo_loss(shape, dtype, device):
    batch = Batch(shape, dtype, device)
    return Contest(
        op=lambda: batch.loss_and_gradient(ppo_loss),
        baselines=batch.baselines(),
        copied=batch.logits,
        moved_bytes=3 * batch.logits.nbytes,
        check=lambda: batch.check(*batch.loss_and_gradient(ppo_loss)),
    )


def make_ppo_loss_in_place(shape, dtype, device):
    batch = Batch(shape, dtype, device)
    logits = batch.logits.clone()

    def check():
        results = batch.loss(ppo_loss_, logits)
        batch.check(results, logits)

    return Contest(
        op=lambda: batch.loss(ppo_loss_, logits),
        baselines=batch.baselines(),
        copied=batch.logits,
        moved_bytes=2 * logits.nbytes,
        check=check,
        reset=lambda: logits.copy_(batch.logits),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=str)
def test_ppo_loss(measure, shape, dtype):
    measure("ppo_loss", make_ppo_loss, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=str)
def test_ppo_loss_in_place(measure, shape, dtype):
    measure("ppo_loss_", make_ppo_loss_in_place, shape, dtype)
