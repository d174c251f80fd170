"""fp16 with a loss scale: the gradient has the digits that `ppo_loss` gives it."""

import math

import pytest
import torch

import ppo_kernels
from ppo_kernels import ppo_loss, ppo_loss_
from tests.conftest import emulates_a_gpu, loss_inputs, ppo_loss_truth, waits_for_nothing

SCALE = 65536.0


def relative_error(grad, truth):
    return ((grad.double() - truth).norm() / truth.norm()).item()


def step(function, inputs, weight, backend, **options):
    """(∂loss/∂hidden, ∂loss/∂weight) times SCALE of a head W, by autograd."""
    leaves = [x.clone().requires_grad_() for x in (inputs["hidden"], weight)]
    rest = {k: x for k, x in inputs.items() if k != "hidden"}
    logits = leaves[0] @ leaves[1].t()
    result = function(logits, **rest, denominator=SCALE, backend=backend, **options)
    return torch.autograd.grad(result.loss * SCALE, leaves)


def head_of(vocabulary, rows):
    inputs = loss_inputs(1, rows, vocabulary, torch.float16)
    del inputs["logits"]
    weight = torch.randn(vocabulary, 16).half() / 4
    hidden = torch.randn(1, rows, 16).half()
    logits = hidden.double() @ weight.double().t()
    logprobs = torch.log_softmax(logits, -1).gather(-1, inputs["tokens"][..., None])[..., 0]
    inputs["old_logprobs"] = logprobs.float() + 0.3 * torch.randn(1, rows)
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0}
    _, grad = ppo_loss_truth(logits, **inputs, denominator=SCALE, **options)
    truth = SCALE * grad @ weight.double(), SCALE * grad[0].t() @ hidden[0].double()
    return inputs | {"hidden": hidden}, weight, options, truth


def test_in_place(backend):
    """The mean of 65,536 tokens: of the softmax fp16 holds nothing before the loss is scaled."""
    rows, vocabulary = (4, 2000) if emulates_a_gpu(backend) else (16, 30000)
    inputs, weight, options, truth = head_of(vocabulary, rows)
    grads = step(ppo_loss_, inputs, weight, backend, **options)
    for ours, true in zip(grads, truth, strict=True):
        assert relative_error(ours, true) < 1e-3


def test_bits_are_those_of_ppo_loss(fused):
    """Where that is scaled too, whatever the strides of the rows."""
    inputs = loss_inputs(3, 5, 523, torch.float16)
    grads = []
    for function in (ppo_loss, ppo_loss_):
        leaf = inputs["logits"].clone().requires_grad_()
        wide = torch.nn.functional.pad(leaf, (0, 5))[..., :523]
        loss = function(**inputs | {"logits": wide}, entropy_coef=0.1, backend=fused).loss
        grads.append(torch.autograd.grad(loss * SCALE, leaf)[0])
    assert torch.equal(*grads)
    assert (grads[0][~inputs["mask"]] == 0).all()


def test_the_logits_version_moves_and_a_second_backward_raises(fused):
    inputs = loss_inputs(2, 3, 50, torch.float16)
    leaf = inputs.pop("logits").requires_grad_()
    logits = leaf * 1
    other = (logits**2).sum()
    result = ppo_loss_(logits, **inputs, backend=fused)
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        result.loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_without_autograd_the_gradient_is_there_at_once(fused):
    inputs = loss_inputs(2, 3, 50, torch.float16)
    _, truth = ppo_loss_truth(**inputs)
    for grad_mode, requires_grad in ((True, False), (False, True)):
        logits = inputs["logits"].clone().requires_grad_(requires_grad)
        with torch.set_grad_enabled(grad_mode):
            ppo_loss_(**inputs | {"logits": logits}, backend=fused)
        torch.testing.assert_close(logits.detach().double(), truth, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("softcap", (None, 8.0))
@pytest.mark.parametrize("biased", (False, True))
def test_from_hidden_states(backend, softcap, biased):
    """Also in many chunks, whose gradients are of other sizes."""
    rows, vocabulary = (6, 300) if emulates_a_gpu(backend) else (24, 3000)
    inputs, weight, options, _ = head_of(vocabulary, rows)
    inputs["advantages"][0, ::3] *= 8
    bias = torch.randn(vocabulary).half() if biased else None
    head = [inputs["hidden"], weight] + [bias] * biased
    exact = [x.double().requires_grad_() for x in head]
    leaves = [x.clone().requires_grad_() for x in head]
    rest = {k: x for k, x in inputs.items() if k != "hidden"}
    results = []
    for tensors, own in (
        (exact, {"backend": "reference"}),
        (leaves, {"backend": backend, "chunk_bytes": 4 * vocabulary * 2}),
    ):
        result = ppo_kernels.linear_ppo_loss(
            *tensors[:2],
            **rest,
            **options,
            **own,
            bias=tensors[2] if biased else None,
            softcap=softcap,
            denominator=SCALE,
        )
        results.append(torch.autograd.grad(result.loss * SCALE, tensors))
    for true, ours in zip(*results, strict=True):
        assert ours.dtype == torch.float16
        assert relative_error(ours, true) < 3e-3


def test_a_ratio_that_only_the_denominator_makes_small(fused):
    """e^20 of a mean of 2^29 tokens is 0.9, though fp16 holds no e^20."""
    logits = torch.zeros(1, 4, dtype=torch.float16)
    rest = torch.tensor([1]), torch.tensor([-20 - 2 * 0.6931472]), torch.tensor([-1.0])
    options = {"denominator": 2.0**29, "backend": fused}
    truth = 4.851652e8 / 2**29 * torch.tensor([[-0.25, 0.75, -0.25, -0.25]])
    weight = torch.eye(4, dtype=torch.float16)
    for function in (
        lambda x: ppo_loss_(x * 1, *rest, **options),
        lambda x: ppo_kernels.linear_ppo_loss(x, weight, *rest, **options),
    ):
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf).loss, leaf)
        torch.testing.assert_close(grad.float(), truth, atol=0, rtol=2e-3)


def one_token_of_a_head(log_ratio, backend, denominator, advantage=1.0):
    hidden, weight = torch.ones(1, 4).half(), torch.eye(4).half()
    old = torch.tensor([-math.log(4.0) - log_ratio])
    leaf = hidden.clone().requires_grad_()
    result = ppo_kernels.linear_ppo_loss(
        *(leaf, weight, torch.tensor([1]), old, torch.tensor([advantage])),
        **{"denominator": denominator, "backend": backend},
    )
    return torch.autograd.grad(result.loss, leaf)[0]


def test_factors_too_small_for_fp32_give_no_gradient(backend):
    grad = one_token_of_a_head(-79.0, backend, SCALE)
    assert (grad == 0).all()


@pytest.mark.parametrize("bad", (0.0, float("nan"), 1e30))
def test_a_temperature_that_does_not_count_plays_no_part(backend, bad):
    """It used to take the scale of its chunk, and the digits of all others with it."""
    inputs, weight, _, _ = head_of(50, 3)
    inputs["mask"][:] = torch.tensor([True, False, True])
    rest = {k: x for k, x in inputs.items() if k != "hidden"}
    grads = []
    for temperature in (1.0, bad):
        temperature = torch.tensor([[1.0, temperature, 1.0]])
        leaf = inputs["hidden"].clone().requires_grad_()
        loss = ppo_kernels.linear_ppo_loss(
            *(leaf, weight), **rest, temperature=temperature, denominator=SCALE, backend=backend
        ).loss
        grads.append(torch.autograd.grad(loss * SCALE, leaf)[0])
    assert torch.equal(*grads)
    assert grads[0].any()


def test_one_large_row_leaves_the_others_their_digits(backend):
    rows, vocabulary = (6, 100) if emulates_a_gpu(backend) else (32, 500)
    inputs, weight, _, _ = head_of(vocabulary, rows)
    inputs["mask"][:] = True
    inputs["advantages"][0, 0] = -1.0
    inputs["old_logprobs"][0, 0] -= 9.0
    rest = {k: x for k, x in inputs.items() if k != "hidden"}
    grads = []
    for dtype, own in ((torch.float64, "reference"), (torch.float16, backend)):
        leaf = inputs["hidden"].to(dtype).requires_grad_()
        loss = ppo_kernels.linear_ppo_loss(
            leaf, weight.to(dtype), **rest, denominator=SCALE, backend=own
        ).loss
        grads.append(torch.autograd.grad(loss * 256.0, leaf)[0][0, 1:])
    assert relative_error(grads[1], grads[0]) < 1e-3


def test_without_autograd_a_gradient_that_fp16_does_not_hold_is_refused(backend):
    """A zero one is held, and a GPU is not waited for."""
    inputs = loss_inputs(2, 3, 50, torch.float16)
    held = inputs | {"advantages": 0 * inputs["advantages"]}
    ppo_loss_(**held | {"logits": inputs["logits"].clone()}, backend=backend)
    if waits_for_nothing(backend):
        pytest.skip("a GPU is not waited for")
    with pytest.raises(ValueError, match="logits must be wider than float16 to hold a gradient"):
        ppo_loss_(**inputs, denominator=2.0**22, backend=backend)
