"""ppo_loss and ppo_loss_ as parts of a graph: upstream gradients, views, writes in place."""

import pytest
import torch

from ppo_kernels import ppo_loss, ppo_loss_, token_logprobs_and_entropy
from tests.conftest import (
    DTYPES,
    loss_inputs,
    ppo_loss_truth,
    run_ppo_loss,
    thread_counts,
    waits_for_nothing,
)


@pytest.mark.parametrize("kind", (int, float, torch.tensor, lambda n: torch.tensor([n])))
def test_micro_batches_with_the_global_denominator_add_up(backend, function, kind):
    inputs = loss_inputs(6, 5, 40, torch.float64)
    options = {"entropy_coef": 0.1, "kl_coef": 0.1, "backend": backend}
    whole, grad = run_ppo_loss(function, inputs, **options)
    count = kind(inputs["mask"].sum().item())
    loss = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {name: x[rows] for name, x in inputs.items()}
        result, part_grad = run_ppo_loss(function, part, denominator=count, **options)
        loss += result.loss
        torch.testing.assert_close(part_grad, grad[rows], atol=1e-15, rtol=0)
    torch.testing.assert_close(loss, whole.loss, atol=1e-14, rtol=0)


@pytest.mark.parametrize("upstream", (1.0, 2.5, 0.0, -1.0))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_upstream_gradient(backend, function, upstream, dtype):
    inputs = loss_inputs(3, 5, 5000, dtype)
    _, grad_truth = ppo_loss_truth(**inputs, entropy_coef=0.1)
    leaf = inputs["logits"].clone().requires_grad_()
    result = function(**(inputs | {"logits": leaf}), entropy_coef=0.1, backend=backend)
    (result.loss * upstream).backward()
    # In place the gradient is rounded to the logits' type before and after it is scaled.
    rtol, atol = (1e-10, 1e-15) if dtype == torch.float64 else (4 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(leaf.grad.double(), upstream * grad_truth, atol=atol, rtol=rtol)


def test_loss_in_a_larger_graph(backend, function):
    """Non-leaf logits, and an upstream gradient that a later op computes."""
    inputs = loss_inputs(3, 5, 40, torch.float64)
    _, grad_truth = ppo_loss_truth(**inputs)
    leaf = inputs["logits"].clone().requires_grad_()
    other = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    result = function(**(inputs | {"logits": leaf * 2 / 2 + 0}), backend=backend)
    ((result.loss * other) ** 2).backward()
    upstream = 2 * result.loss.item() * 1.5**2
    torch.testing.assert_close(leaf.grad, upstream * grad_truth, atol=1e-13, rtol=0)
    assert other.grad.item() == pytest.approx(2 * result.loss.item() ** 2 * 1.5)


@pytest.mark.parametrize("upstream", (1, 2.5))
@pytest.mark.parametrize("view", ("shifted", "last positions", "transposed"))
def test_row_strided_logits(backend, function, view, upstream):
    base = torch.randn(4, 9, 1200)
    taken = {
        "shifted": lambda x: x[:, :-1],
        "last positions": lambda x: x[:, -3:],
        "transposed": lambda x: x.transpose(0, 1),
    }[view]
    shape = taken(base).shape[:2]
    inputs = loss_inputs(*shape, 1200) | {"logits": taken(base)}
    _, expected = run_ppo_loss(ppo_loss, inputs, denominator=1, backend="reference")
    leaf = base.clone().requires_grad_()
    # A non-leaf whose rows are strided.
    logits = taken(leaf * 1)
    result = function(**(inputs | {"logits": logits}), denominator=1, backend=backend)
    (upstream * result.loss).backward()
    torch.testing.assert_close(taken(leaf.grad), upstream * expected, atol=3e-5, rtol=1e-5)
    assert leaf.grad.count_nonzero() == taken(leaf.grad).count_nonzero()


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_storage_holds_the_gradient(backend, dtype, requires_grad):
    inputs = loss_inputs(3, 5, 5000, dtype)
    options = {"entropy_coef": 0.1, "kl_coef": 0.2, "denominator": 1, "backend": backend}
    expected, expected_grad = run_ppo_loss(ppo_loss, inputs, **options)
    logits = inputs["logits"].clone().requires_grad_(requires_grad)
    pointer, version = logits.data_ptr(), logits._version
    result = ppo_loss_(**(inputs | {"logits": logits}), **options)
    assert logits._version > version
    assert logits.data_ptr() == pointer
    assert result.loss.requires_grad == requires_grad
    if dtype == torch.float16 and requires_grad:
        result.loss.backward()  # which writes it
    assert torch.equal(logits.detach(), expected_grad)
    assert all(torch.equal(x.detach(), y) for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("vocabulary", (50, 4099, 4100))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_in_place_scores_tokens_as_token_logprobs_does(backend, dtype, vocabulary):
    """Bitwise, so that the ratio to log-probs of the same weights is exactly 1."""
    inputs = loss_inputs(3, 5, vocabulary, dtype) | {"mask": None}
    options = {"temperature": 0.7, "backend": backend}
    expected = token_logprobs_and_entropy(inputs["logits"], inputs["tokens"], **options)
    inputs["old_logprobs"] = expected.logprobs
    result = ppo_loss_(**inputs, **options)
    assert torch.equal(result.logprobs, expected.logprobs)
    assert torch.equal(result.token_entropy, expected.entropy)
    assert result.approx_kl == 0


def test_in_place_writes_nothing_outside_a_view(backend):
    base = torch.randn(4, 9, 700)
    inputs = loss_inputs(4, 8, 600) | {"logits": base[:, :-1, 50:650]}
    before = base.clone()
    ppo_loss_(**inputs, backend=backend)
    assert torch.equal(base[:, -1], before[:, -1])
    assert torch.equal(base[..., :50], before[..., :50])
    assert torch.equal(base[..., 650:], before[..., 650:])
    assert (base[:, :-1, 50:650] != before[:, :-1, 50:650]).all()


def test_in_place_makes_graphs_that_need_the_logits_raise(backend):
    inputs = loss_inputs(3, 5, 40)
    leaf = inputs["logits"].clone().requires_grad_()
    logits = leaf * 1
    needs_them = logits.exp().sum() + torch.log_softmax(logits, -1).sum() + logits.square().sum()
    ppo_loss_(**(inputs | {"logits": logits}), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needs_them.backward()


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_autograd(backend, function, mode):
    inputs = loss_inputs(3, 5, 40)
    expected, grad = run_ppo_loss(ppo_loss, inputs, backend=backend)
    with mode():
        logits = inputs["logits"].clone()
        result = function(**(inputs | {"logits": logits}), backend=backend)
    assert not result.loss.requires_grad
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(logits, grad if function is ppo_loss_ else inputs["logits"])


def test_inputs_are_not_written(backend, function):
    inputs = loss_inputs(3, 5, 40)
    before = {name: x.clone() for name, x in inputs.items()}
    run_ppo_loss(function, inputs, entropy_coef=0.1, kl_coef=0.1, backend=backend)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


def test_in_place_second_backward_raises(backend):
    inputs = loss_inputs(3, 5, 40)
    inputs["logits"].requires_grad_()
    result = ppo_loss_(**inputs, backend=backend)
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"ppo_loss_ can be differentiated once"):
        result.loss.backward()


def test_second_derivative_is_refused(fused, function):
    inputs = loss_inputs(3, 5, 40)
    inputs["logits"].requires_grad_()
    result = function(**inputs, backend=fused)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(result.loss, inputs["logits"], create_graph=True)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            lambda: torch.randn(1, 5, 40).expand(3, 5, 40),
            "logits must not be expanded or have overlapping rows",
        ),
        (
            lambda: torch.randn(3, 5, 80)[..., ::2],
            "logits must have stride 1 in its last dimension",
        ),
        (
            lambda: torch.randn(60).as_strided((3, 5, 40), (5, 1, 1)),
            "logits must not be expanded or have overlapping rows",
        ),
    ],
    ids=("expanded", "strided vocabulary", "overlapping rows"),
)
def test_in_place_refuses_logits_it_cannot_write(backend, logits, message):
    inputs = loss_inputs(3, 5, 40) | {"logits": logits()}
    with pytest.raises(ValueError, match=message):
        ppo_loss_(**inputs, backend=backend)


def test_other_outputs_are_detached(backend, function):
    inputs = loss_inputs(3, 5, 40)
    inputs["logits"].requires_grad_()
    result = function(**inputs, kl_coef=0.1, backend=backend)
    assert result.loss.requires_grad
    assert not any(x.requires_grad for x in result[1:])


def test_repeats_bitwise(backend, function):
    inputs = loss_inputs(3, 5, 40001, torch.bfloat16)
    first, second = (
        run_ppo_loss(function, inputs, entropy_coef=0.1, backend=backend) for _ in range(2)
    )
    for a, b in zip((*first[0], first[1]), (*second[0], second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_row_is_bitwise_the_same_wherever_it_stands(fused, function, set_threads, dtype):
    inputs = loss_inputs(1, 30, 40009, dtype)
    inputs = {name: x[0] for name, x in inputs.items()} | {"mask": torch.ones(30).bool()}
    inputs["mask"][5] = False
    inputs["logits"][0] = inputs["logits"][20]
    order = torch.tensor([20])
    seen = []
    for threads in thread_counts(fused):
        set_threads(threads)
        for order in ([20], [3, 20], [20, 4, 5], [*range(20), 20], [*range(5, 30), 1]):
            batch = {name: x[order] for name, x in inputs.items()}
            result, grad = run_ppo_loss(
                function, batch, entropy_coef=0.1, denominator=7, backend=fused
            )
            i = order.index(20)
            seen.append((result.logprobs[i], result.token_entropy[i], grad[i]))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("upstream", (torch.inf, torch.nan))
def test_masked_out_rows_stay_zero_under_an_upstream_that_is_not_finite(
    backend, function, upstream
):
    logits = torch.randn(4, 11, requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    tokens = torch.tensor([1, -(10**9), 2, 10**9])
    old_logprobs, advantages = torch.full((4,), -2.0), torch.ones(4)
    loss = function(logits * 1, tokens, old_logprobs, advantages, mask, backend=backend).loss
    (loss * upstream).backward()
    assert not logits.grad[mask].isfinite().all()
    if (backend, function) != (
        "reference",
        ppo_loss,
    ):  # autograd of the plain formula multiplies by the mask's zero
        assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize("denominator", (-2.0, torch.nan))
def test_denominator_must_be_a_count(backend, denominator):
    inputs = loss_inputs(2, 3, 11)
    with pytest.raises(ValueError, match="denominator must be"):
        ppo_loss(**inputs, denominator=denominator, backend=backend)
    tensor = torch.tensor(denominator)
    if waits_for_nothing(backend):
        assert ppo_loss(**inputs, denominator=tensor, backend=backend).loss.isnan()
        return
    with pytest.raises(ValueError, match="denominator must be"):
        ppo_loss(**inputs, denominator=tensor, backend=backend)
