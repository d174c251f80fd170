"""ppo_loss_ where autograd hands what it saves to hooks, which know nothing of versions."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ppo_kernels import ppo_loss, ppo_loss_
from tests.conftest import loss_inputs


def _head(hidden, function, inputs, backend):
    """Logits whose last op saved its output, a z-loss, which saves them, and the policy's loss."""
    logits = torch.tanh(hidden)
    z_loss = torch.logsumexp(logits, -1).square().mean()
    return z_loss + function(**(inputs | {"logits": logits}), backend=backend).loss


def _gradient(run, inputs):
    leaf = inputs["logits"].clone().requires_grad_()
    run(leaf).backward()
    return leaf.grad


def _identity_hooks():
    return saved_tensors_hooks(lambda x: x, lambda x: x)


@pytest.mark.parametrize("hooks", (save_on_cpu, _identity_hooks))
def test_other_consumers_of_the_logits_keep_their_gradient(backend, hooks):
    inputs = loss_inputs(3, 5, 40)

    def run(hidden):
        with hooks():
            return _head(hidden, ppo_loss_, inputs, backend)

    expected = _gradient(lambda x: _head(x, ppo_loss, inputs, backend), inputs)
    torch.testing.assert_close(_gradient(run, inputs), expected)


def test_other_consumers_of_recomputed_logits_keep_their_gradient(backend):
    inputs = loss_inputs(3, 5, 40)

    def run(hidden):
        return checkpoint(_head, hidden, ppo_loss_, inputs, backend, use_reentrant=False)

    expected = _gradient(lambda x: _head(x, ppo_loss, inputs, backend), inputs)
    torch.testing.assert_close(_gradient(run, inputs), expected)


def test_hooks_are_seen_without_the_private_function(backend, monkeypatch):
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    test_other_consumers_of_the_logits_keep_their_gradient(backend, _identity_hooks)
    inputs = loss_inputs(3, 5, 40)
    logits = inputs["logits"].clone()
    ppo_loss_(**(inputs | {"logits": logits}), backend=backend)
    assert not torch.equal(logits, inputs["logits"])


@pytest.mark.parametrize("mode", (torch.no_grad, torch.enable_grad))
def test_a_gradient_that_only_the_storage_would_hold_is_refused(backend, mode):
    inputs = loss_inputs(3, 5, 40)
    before = inputs["logits"].clone()
    with _identity_hooks(), mode(), pytest.raises(RuntimeError, match="under saved-tensor hooks"):
        ppo_loss_(**inputs, backend=backend)
    assert torch.equal(inputs["logits"], before)
