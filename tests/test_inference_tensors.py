"""Arguments that a rollout made in inference mode, which autograd must not save."""

import pytest
import torch

from ppo_kernels import linear_token_logprobs, ppo_loss_
from tests.calls import NAMES, calls
from tests.conftest import loss_inputs


def made_in_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


def backends_of(call, backend):
    if not call.takes_backend and backend != "reference":
        pytest.skip("it has no backend")
    return backend


@pytest.mark.parametrize("name", NAMES)
def test_constants_are_accepted(backend, name):
    call = calls()[name]
    backend = backends_of(call, backend)
    expected = call.results_and_gradients(backend)
    rollout = {name: made_in_inference_mode(x) for name, x in call.constants.items()}
    got = call.results_and_gradients(backend, **rollout)
    assert all(
        x.equal(y) for a, b in zip(expected, got, strict=True) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("constant", ("hidden", "weight", "bias"))
def test_a_part_of_a_head_may_be_constant(backend, constant):
    call = calls()["linear_token_logprobs"]
    expected = call.results_and_gradients(backend)
    arguments = {name: x.clone().requires_grad_() for name, x in call.differentiable.items()}
    arguments[constant] = made_in_inference_mode(arguments[constant].detach())
    linear_token_logprobs(
        **arguments, **call.constants, **call.numbers, backend=backend
    ).sum().backward()
    for (name, x), grad in zip(arguments.items(), expected[1], strict=True):
        if name != constant:
            assert x.grad.equal(grad)


def test_logits_of_inference_mode_are_not_written_outside_of_it(backend):
    inputs = loss_inputs(2, 3, 11)
    inputs["logits"] = made_in_inference_mode(inputs["logits"])
    before = inputs["logits"].clone()
    with pytest.raises(ValueError, match="logits must not be made in inference mode"):
        ppo_loss_(**inputs, backend=backend)
    assert inputs["logits"].equal(before)
