"""TRL's function of hidden states on our ops, against formulas, and what it hands on to TRL's own.

`tests/peers` has the real one, where TRL is installed.
"""

import sys
import types

import pytest
import torch

from ppo_kernels import integrations
from ppo_kernels.integrations import trl
from tests.test_integrations import truth


def scored(hidden, weight, bias, targets):
    """At temperature 0.7, logit scale 0.5 and softcap 3."""
    log_p, entropy = truth(3 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3) / 0.7)
    return log_p.gather(-1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("rows", [9, 0])
@pytest.mark.parametrize("outputs", [("log_probs",), ("entropy", "log_probs")])
def test_values_and_gradients(outputs, rows):
    """A half precision head is taken as fp32, as the hidden states are."""
    head = [torch.randn(37, 8).bfloat16(), torch.randn(37).bfloat16()]
    leaves = [torch.randn(rows, 8), *head]
    doubles = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    targets = torch.randint(37, (rows,))
    result = trl.ChunkedLogProbFunction.apply(*leaves, targets, 0.7, 16, 3.0, 0.5, outputs)
    assert len(result) == 5 and [x is None for x in result[2:]] == 3 * [True]
    assert (result[1] is None) == ("entropy" not in outputs)
    result = [x for x in result if x is not None]
    expected = scored(*doubles, targets)[: len(result)]
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x, y.float(), rtol=2e-6, atol=2e-6)
    upstream = [torch.rand(rows) for _ in result]
    grads = torch.autograd.grad(result, leaves, upstream)
    for x, y in zip(grads, torch.autograd.grad(expected, doubles, upstream), strict=True):
        rtol = 2e-5 if x.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=2e-6)


def test_fp64_hidden_states_give_fp32():
    hidden, weight = torch.randn(2, 5, 8, dtype=torch.float64)
    apply = trl.ChunkedLogProbFunction.apply
    result = apply(hidden, weight, None, torch.arange(5), 1.0, 16, None, 1.0, ("entropy",))
    log_p, entropy = truth(hidden @ weight.T)
    torch.testing.assert_close(result[0], log_p.diagonal().float())
    torch.testing.assert_close(result[1], entropy.float())


@pytest.fixture
def patch_on(monkeypatch):
    """`patch` for a package that holds the class given; another module of it is missing."""
    theirs = types.ModuleType("somepeer")
    monkeypatch.setitem(sys.modules, "somepeer", theirs)
    ours = (trl.ChunkedLogProbFunction,)
    later = {"somepeer.absent": ours, "somepeer": ours}
    peer = types.SimpleNamespace(REPLACES={}, REPLACES_IN_LATER_VERSIONS=later)
    monkeypatch.setitem(integrations._PEERS, "somepeer", peer)
    monkeypatch.setattr(trl.ChunkedLogProbFunction, "theirs", None)

    def patch(function):
        theirs.ChunkedLogProbFunction = function
        return integrations.patch("somepeer")

    return patch


@pytest.mark.parametrize(
    ("partitioned", "more"),
    [
        (False, ()),
        (False, (1.0, ("log_probs", "mean_logits"))),
        (False, (0.0, ("log_probs",))),
        (True, (1.0, ("log_probs",))),
    ],
)
def test_handed_on(patch_on, partitioned, more):
    """To TRL's own within patch, nested too and with all arguments; before that an error."""
    weight = torch.randn(5, 8)
    if partitioned:
        weight.ds_id = 0
    arguments = torch.randn(2, 8), weight, None, torch.arange(2), 0.7, 16, None, *more
    with pytest.raises(ValueError, match="outputs must be of log_probs and entropy, logit_scale"):
        trl.ChunkedLogProbFunction.apply(*arguments)
    calls = []

    class ChunkedLogProbFunction:
        forward = trl.ChunkedLogProbFunction.forward

        @staticmethod
        def apply(*arguments):
            calls.append(arguments)

    with patch_on(ChunkedLogProbFunction), integrations.patch("somepeer"):
        sys.modules["somepeer"].ChunkedLogProbFunction.apply(*arguments)
        assert trl.ChunkedLogProbFunction.theirs is ChunkedLogProbFunction
    assert sys.modules["somepeer"].ChunkedLogProbFunction is ChunkedLogProbFunction
    assert len(calls) == 1 and calls[0][: len(arguments)] == arguments and len(calls[0]) == 9


def test_patch_looks_at_the_signature_of_forward(patch_on):
    class ChunkedLogProbFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, divisor=None):
            pass

    with (
        pytest.raises(TypeError, match=r"must have .*logit_scale=1\.0.*got .*divisor=None"),
        patch_on(ChunkedLogProbFunction),
    ):
        pass
