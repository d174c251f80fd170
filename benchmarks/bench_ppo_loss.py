"""The PPO loss from logits with its gradient: to a new tensor, and in place.

Liger's GRPO loss takes part where it is importable.
"""

import functools

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
from ppo_kernels import ppo_loss, ppo_loss_, reference, token_logprobs

ENTROPY_COEF = 0.01

eager_loss = functools.partial(ppo_loss, backend="reference")
compiled_loss = torch.compile(eager_loss, dynamic=False)


class Batch:
    """Logits and the rest of a loss's arguments. Every row has a gradient: the kernels skip those
    without, and the entropy bonus is there so that none is."""

    def __init__(self, shape, dtype, setting):
        device = setting.device
        self.setting = setting
        self.logits = torch.randn(shape, dtype=dtype, device=device).mul_(2)
        self.tokens = torch.randint(shape[1], shape[:1], device=device)
        logprobs = token_logprobs(self.logits, self.tokens, backend=setting.backend)
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

    def baselines(self, logits, *, inplace):
        """Plain PyTorch, and Liger of `logits`, which it may overwrite."""
        shape, baselines = tuple(self.logits.shape), {}
        if shape[0] <= MOST_EAGER_TOKENS:
            baselines["eager"] = lambda: self.loss_and_gradient(eager_loss)
            baselines |= peers.liger_losses(
                self.setting,
                logits,
                self.tokens,
                self.old_logprobs,
                self.advantages,
                inplace=inplace,
            )
        if shape in COMPILED:
            baselines["compile"] = lambda: self.loss_and_gradient(compiled_loss)
        return baselines

    def check(self, results, gradient, baselines):
        """Gradient and per-token results on some rows, the loss that follows from the latter on
        all, then what the baselines give."""
        got = (results.logprobs, results.token_entropy, gradient)
        eager, truth = (self._rows(dtype) for dtype in (self.logits.dtype, torch.float64))
        names = ("logprobs", "token_entropy", "gradient")
        # The rounding of a log-probability near -10 is ten times that of the ratio that follows.
        roundings = (0, 0, 16)
        for name, more, x, *expected in zip(names, roundings, got, eager, truth, strict=True):
            check_rows(name, x, *expected, fp32_roundings=more)

        per_token = (results.logprobs.double(), self.old_logprobs.double(), self.advantages)
        policy_loss, *_ = reference.clipped_policy_loss(*per_token)
        loss = policy_loss - ENTROPY_COEF * results.token_entropy.double().mean()
        torch.testing.assert_close(results.loss, loss.float())

        if "compile" in baselines:
            compiled, compiled_gradient = baselines["compile"]()
            check_agreement(compiled[0].detach(), results.loss)
            check_agreement(checked(compiled_gradient), checked(gradient))

    def _rows(self, dtype):
        rows = checked(self.logits).to(dtype).requires_grad_()
        loss, *_, logprobs, token_entropy = eager_loss(
            rows,
            checked(self.tokens),
            checked(self.old_logprobs),
            checked(self.advantages),
            entropy_coef=ENTROPY_COEF,
            denominator=self.tokens.numel(),
        )
        return logprobs, token_entropy, *torch.autograd.grad(loss, rows)


def make_ppo_loss(shape, dtype, setting):
    batch = Batch(shape, dtype, setting)
    baselines = batch.baselines(batch.logits, inplace=False)
    function = functools.partial(ppo_loss, backend=setting.backend)

    def check():
        results, gradient = batch.loss_and_gradient(function)
        batch.check(results, gradient, baselines)
        if "liger" in baselines:
            baselines["liger"].check(results.logprobs)

    return Contest(
        op=lambda: batch.loss_and_gradient(function),
        baselines=baselines,
        copied=batch.logits,
        moved_bytes=2 * batch.logits.nbytes,
        check=check,
    )


def make_ppo_loss_in_place(shape, dtype, setting):
    batch = Batch(shape, dtype, setting)
    logits = batch.logits.clone()
    baselines = batch.baselines(logits, inplace=True)
    function = functools.partial(ppo_loss_, backend=setting.backend)

    def reset():
        logits.copy_(batch.logits)

    def check():
        results = batch.loss(function, logits)
        batch.check(results, logits, baselines)
        if "liger" in baselines:
            reset()
            baselines["liger"].check(results.logprobs)

    return Contest(
        op=lambda: batch.loss(function, logits),
        baselines=baselines,
        copied=batch.logits,
        moved_bytes=2 * logits.nbytes,
        check=check,
        reset=reset,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ppo_loss(measure, shape, dtype):
    measure("ppo_loss", make_ppo_loss, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ppo_loss_in_place(measure, shape, dtype):
    measure("ppo_loss_", make_ppo_loss_in_place, shape, dtype)


def test_ppo_loss_in_place_as_tokens_grow(measure, growing_shape):
    measure("ppo_loss_", make_ppo_loss_in_place, growing_shape, torch.float32)
