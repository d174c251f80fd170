"""Where the upstream gradient is 0 the gradient is 0, whatever the derivative there."""

import math

import pytest
import torch

import ppo_kernels
from ppo_kernels import masked_mean
from ppo_kernels.reference import ESTIMATORS

GARBAGE = (math.nan, math.inf, -math.inf)
MASK = torch.tensor([True, False, True])


def gradient(op, x, mask, *others):
    """∂/∂x of the mean of op(x, *others) over the mask."""
    leaf = x.clone().requires_grad_()
    value = masked_mean(op(leaf, *others), mask, backend="reference")
    assert value.isfinite()
    value.backward()
    return leaf.grad


@pytest.fixture
def mask():
    return MASK.to(torch.get_default_device())


@pytest.mark.parametrize("side", (0, 1))
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("garbage", (*GARBAGE, -300.0))
def test_kl_estimate(backend, mask, estimator, garbage, side):
    pair = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.5])]

    def both(x):
        pair[side] = x
        return ppo_kernels.kl_estimate(*pair, estimator=estimator, backend=backend)

    clean = pair[side]
    expected = gradient(both, clean, mask)
    dirty = gradient(both, clean.masked_fill(~mask, garbage), mask)
    assert torch.equal(dirty, expected)
    assert dirty[1] == 0


def _entropy(x, tokens, backend):
    return ppo_kernels.token_logprobs_and_entropy(x, tokens, backend=backend).entropy


def _logprobs(x, tokens, backend):
    return ppo_kernels.token_logprobs(x, tokens, backend=backend)


def _kl(x, tokens, backend):
    return ppo_kernels.kl_divergence(x, torch.arange(21.0).view(3, 7).cos(), backend=backend)


@pytest.mark.parametrize("op", (_logprobs, _entropy, _kl), ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_of_logits(backend, mask, op, garbage):
    """Whether one logit is garbage or the whole row."""
    tokens, clean = torch.tensor([1, 2, 3]), torch.randn(3, 7)
    expected = gradient(op, clean, mask, tokens, backend)
    for place in ((1, 4), (1,)):
        dirty = clean.clone()
        dirty[place] = garbage
        grad = gradient(op, dirty, mask, tokens, backend)
        assert torch.equal(grad, expected)
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_kl_of_a_reference_behind_the_mask(backend, mask, garbage):
    logits, ref_logits = torch.randn(2, 3, 7)
    ref_logits[1, 4] = garbage
    grad = gradient(
        lambda x: ppo_kernels.kl_divergence(x, ref_logits, backend=backend), logits, mask
    )
    assert (grad[1] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("softcap", (None, 5.0))
@pytest.mark.parametrize("garbage", GARBAGE)
def test_of_hidden_states(backend, mask, softcap, garbage):
    hidden, weight, bias = torch.randn(3, 4), torch.randn(7, 4), torch.randn(7)
    hidden[1, 2] = garbage
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    scored = ppo_kernels.linear_token_logprobs_and_entropy(
        hidden, weight, torch.tensor([1, 2, 3]), bias=bias, softcap=softcap, backend=backend
    )
    masked_mean(scored.logprobs + scored.entropy, mask, backend=backend).backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert (hidden.grad[1] == 0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_of_a_slice_of_the_vocabulary(backend, mask, group_of_one, garbage):
    logits, ref_logits = torch.randn(2, 3, 7)
    logits[1, 4] = garbage
    place = {"group": group_of_one, "backend": backend}

    def scored(x):
        return sum(
            ppo_kernels.vocab_parallel_token_logprobs_and_entropy(
                x, torch.tensor([1, 2, 3]), vocab_start=0, **place
            )
        )

    def kl(x):
        return ppo_kernels.vocab_parallel_kl_divergence(x, ref_logits, **place)

    for op in (scored, kl):
        grad = gradient(op, logits, mask)
        assert grad.isfinite().all()
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_rescaled_in_place_by_zero(fused, dtype):
    """What is stored may have overflowed."""
    logits = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    rest = torch.tensor([1, 2]), torch.tensor([-80.0, -1.0]), torch.full((2,), -3e37)
    loss = ppo_kernels.ppo_loss_(logits * 1, *rest, backend=fused).loss
    (grad,) = torch.autograd.grad(loss, logits, torch.zeros(()))
    assert (grad == 0).all()


def test_reference_stays_twice_differentiable():
    logits, tokens = torch.randn(3, 5, dtype=torch.float64), torch.tensor([1, 2, 3])
    other = torch.randn(3, 5, dtype=torch.float64)
    weight = torch.randn(5, 4, dtype=torch.float64)
    hidden = torch.randn(3, 4, dtype=torch.float64)
    options = {"backend": "reference"}
    functions = {
        "scores": (
            lambda x: sum(ppo_kernels.token_logprobs_and_entropy(x, tokens, **options)),
            (logits,),
        ),
        "kl": (lambda x: ppo_kernels.kl_divergence(x, other, **options), (logits,)),
        "linear": (
            lambda x, w: ppo_kernels.linear_token_logprobs(x, w, tokens, softcap=3.0, **options),
            (hidden, weight),
        ),
        **{
            name: (
                lambda x, y, name=name: ppo_kernels.kl_estimate(x, y, estimator=name, **options),
                (logits, other),
            )
            for name in ("k2", "k3")
        },
    }
    for function, inputs in functions.values():
        leaves = [x.clone().requires_grad_() for x in inputs]
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
