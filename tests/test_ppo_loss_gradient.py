"""ppo_loss makes its gradient in its forward, where nothing speaks against it."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ppo_kernels import ppo_loss, ppo_loss_
from tests.conftest import loss_inputs, ppo_loss_truth

OPTIONS = {"entropy_coef": 0.1, "kl_coef": 0.1}


class Called(TorchDispatchMode):
    """Names of our ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("ppo_kernels"):
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def loss_of(leaf, inputs, backend):
    return ppo_loss(**inputs | {"logits": leaf}, **OPTIONS, backend=backend).loss


def names_of(forward, *backwards):
    """Of a forward, and of each backward."""
    with Called() as called:
        loss = forward()
    names = [called.names]
    for backward in backwards:
        with Called() as called:
            backward(loss)
        names.append(called.names)
    return names


def test_each_pass_over_the_logits_is_made_once(fused):
    inputs = loss_inputs(2, 3, 50, torch.float32)
    leaf = inputs["logits"].requires_grad_()
    retain = {"retain_graph": True}
    assert names_of(
        lambda: loss_of(leaf, inputs, fused),
        lambda loss: loss.backward(**retain),
        lambda loss: loss.backward(**retain),
    ) == [["ppo_loss_and_gradient"], ["rescale_"], ["ppo_loss_and_gradient", "rescale_"]]
    with torch.no_grad():
        assert names_of(lambda: loss_of(leaf, inputs, fused)) == [["ppo_loss"]]
    assert names_of(lambda: loss_of(leaf.detach(), inputs, fused)) == [["ppo_loss"]]


@pytest.mark.parametrize("kind", ("fp16", "save_on_cpu", "checkpoint"))
def test_where_the_backward_makes_it(fused, kind):
    """fp16 holds no gradient before the loss scale; hooks may drop what a forward saves."""
    inputs = loss_inputs(2, 3, 50, torch.float16 if kind == "fp16" else torch.float32)
    leaf = inputs["logits"].requires_grad_()

    def forward():
        if kind == "checkpoint":
            return checkpoint(loss_of, leaf, inputs, fused, use_reentrant=False)
        if kind == "save_on_cpu":
            with save_on_cpu():
                return loss_of(leaf, inputs, fused)
        return loss_of(leaf, inputs, fused)

    again = ["ppo_loss"] * (kind == "checkpoint")
    assert names_of(forward, lambda loss: loss.backward()) == [
        ["ppo_loss"],
        [*again, "token_logprobs_backward"],
    ]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("vocabulary", (7, 1031, 1024))
def test_bits_are_those_of_the_loss_in_place(fused, vocabulary, dtype):
    """Of whole rows, and of such as begin anywhere; the logits stay."""
    inputs = loss_inputs(3, 4, vocabulary, dtype)
    wide = torch.nn.functional.pad(inputs["logits"], (1, 2))[..., 1:-2]
    for logits in (inputs["logits"], wide):
        leaf, before = logits.clone().requires_grad_(), logits.clone()
        view = torch.nn.functional.pad(leaf, (1, 2))[..., 1:-2] if logits is wide else leaf * 1
        loss_of(view, inputs, fused).backward()
        in_place = torch.nn.functional.pad(logits, (1, 2))[..., 1:-2]
        ppo_loss_(**inputs | {"logits": in_place}, **OPTIONS, backend=fused)
        assert leaf.grad.equal(in_place)
        assert view.detach().equal(before)
        assert (leaf.grad[~inputs["mask"]] == 0).all()


def test_a_second_backward_finds_nothing_of_what_became_of_the_first_gradient(fused):
    inputs = loss_inputs(2, 3, 50, torch.float64)
    leaf = inputs["logits"].requires_grad_()
    loss = loss_of(leaf, inputs, fused)
    _, truth = ppo_loss_truth(**inputs | {"logits": leaf.detach()}, **OPTIONS)
    for upstream in (1.0, -3.0, 0.0, 1.0):
        (grad,) = torch.autograd.grad(upstream * loss, leaf, retain_graph=True)
        torch.testing.assert_close(grad, upstream * truth, atol=1e-12, rtol=1e-10)
        grad.fill_(torch.nan)


def test_logits_may_be_written_to_before_the_first_backward_alone(fused):
    inputs = loss_inputs(2, 3, 50, torch.float64)
    leaf = inputs["logits"].requires_grad_()
    logits = leaf * 1
    _, truth = ppo_loss_truth(**inputs | {"logits": leaf.detach()}, **OPTIONS)
    loss = loss_of(logits, inputs, fused)
    with torch.no_grad():
        logits.zero_()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, truth, atol=1e-12, rtol=1e-10)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore")
def test_under_compiled_autograd(fused):
    """Which calls the backward with a stand-in for its context, also when the graph is retained."""
    from torch._dynamo import compiled_autograd

    inputs = loss_inputs(2, 3, 50, torch.float64)
    leaf = inputs["logits"].requires_grad_()
    _, truth = ppo_loss_truth(**inputs | {"logits": leaf.detach()}, **OPTIONS)
    loss = loss_of(leaf, inputs, fused)
    for upstream in (2.0, 3.0, 1.0):
        leaf.grad = None
        with compiled_autograd._enable(torch.compile(backend="eager")):
            (upstream * loss).backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, upstream * truth, atol=1e-12, rtol=1e-10)
    assert loss.grad_fn.held == []


def test_a_batch_of_upstream_gradients(fused):
    inputs = loss_inputs(2, 3, 50, torch.float64)
    leaf = inputs["logits"].requires_grad_()
    _, truth = ppo_loss_truth(**inputs | {"logits": leaf.detach()}, **OPTIONS)
    loss, upstream = loss_of(leaf, inputs, fused), torch.tensor([1.0, -2.0, 0.0]).double()
    (grads,) = torch.autograd.grad(loss, leaf, upstream, is_grads_batched=True)
    expected = upstream.view(3, 1, 1, 1) * truth
    torch.testing.assert_close(grads, expected, atol=1e-12, rtol=1e-10)
