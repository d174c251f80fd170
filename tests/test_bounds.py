"""Results stay within their bounds, and logits may be as large as their type holds."""

import math

import pytest
import torch

import ppo_kernels
from tests.conftest import DTYPES, awkward_rows, emulates_a_gpu


def nearly_one_hot(vocabulary, dtype):
    """Rows in which one token has all but a rounding of the probability, more or less."""
    gaps = torch.tensor([5.0, 10, 14, 16, 17, 18, 20, 30, 100])
    rows = torch.randn(9, vocabulary) * 0.1
    rows[torch.arange(9), torch.arange(9) % vocabulary] = gaps + 0.3
    return torch.cat((rows, rows + 1000, awkward_rows(vocabulary).float())).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (2, 130, 5000))
def test_nothing_is_beyond_its_bound(backend, vocabulary, dtype, group_of_one):
    if vocabulary == 5000 and emulates_a_gpu(backend) and dtype != torch.float32:
        pytest.skip("too long without a GPU")
    logits = nearly_one_hot(vocabulary, dtype)
    tokens = logits.argmax(-1)
    options = {"backend": backend}
    scored = ppo_kernels.token_statistics(logits, tokens, **options)
    assert (scored.logprobs <= 0).all()
    assert (scored.entropy >= 0).all()
    assert ((scored.max_prob >= 0) & (scored.max_prob <= 1)).all()
    assert ((scored.sum_sq_probs >= 0) & (scored.sum_sq_probs <= 1)).all()
    assert (scored.varentropy >= 0).all()
    pair = ppo_kernels.token_logprobs_and_entropy(logits, tokens, **options)
    place = options | {"group": group_of_one}
    split = ppo_kernels.vocab_parallel_token_logprobs_and_entropy(
        logits, tokens, vocab_start=0, **place
    )
    ids = torch.arange(vocabulary).repeat(len(logits))
    offsets = torch.arange(len(logits) + 1) * vocabulary
    kept = ppo_kernels.kept_token_logprobs_and_entropy(logits, tokens, ids, offsets)
    loss = ppo_kernels.ppo_loss(logits, tokens, pair.logprobs, pair.entropy, **options)
    for logprobs, entropy in (pair, split, kept, (loss.logprobs, loss.token_entropy)):
        assert (logprobs <= 0).all()
        assert (entropy >= 0).all()
    near = logits + 1e-3 * torch.randn(logits.shape).to(dtype)
    for other in (logits, near, logits.roll(1, 0)):
        assert (ppo_kernels.kl_divergence(logits, other, **options) >= 0).all()
        assert (ppo_kernels.vocab_parallel_kl_divergence(logits, other, **place) >= 0).all()


def huge_rows(vocabulary, dtype):
    """(rows, where each has its probability, in equal parts)."""
    low, top = torch.finfo(dtype).min, torch.finfo(dtype).max
    rows = torch.full((6, vocabulary), low, dtype=dtype)
    where = torch.zeros(6, vocabulary, dtype=torch.bool)
    where[0] = True
    rows[1, 3] = 2.0
    where[1, 3] = True
    rows[2] = top
    where[2] = True
    rows[3, [1, vocabulary - 1]] = top
    where[3, [1, vocabulary - 1]] = True
    rows[4, 5:] = low / 2
    where[4, 5:] = True
    rows[5] = -torch.inf
    rows[5, ::2] = low
    where[5, ::2] = True
    return rows, where


@pytest.mark.parametrize("temperature", (1.0, 0.05))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (128, 1031, 20000))
def test_logits_may_be_as_large_as_their_type_holds(
    backend, vocabulary, dtype, temperature, group_of_one
):
    """All of them finfo.min, what a mask leaves, is a uniform distribution, as in eager PyTorch."""
    if vocabulary == 20000 and emulates_a_gpu(backend) and dtype != torch.bfloat16:
        pytest.skip("too long without a GPU")
    logits, where = huge_rows(vocabulary, dtype)
    count = where.sum(-1)
    tokens = where.int().argmax(-1)
    truth = -count.double().log()
    one_hot = torch.nn.functional.one_hot(tokens, vocabulary)
    grad_truth = (one_hot - where / count[:, None].double()) / temperature
    options = {"temperature": temperature, "backend": backend}
    place = options | {"group": group_of_one, "vocab_start": 0}
    for op, own in (
        (ppo_kernels.token_logprobs_and_entropy, options),
        (ppo_kernels.vocab_parallel_token_logprobs_and_entropy, place),
    ):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = op(leaf, tokens, **own)
        torch.testing.assert_close(logprobs.detach().double(), truth, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy.detach().double(), -truth, atol=1e-5, rtol=0)
        (logprobs.sum() + 0 * entropy.sum()).backward()
        tolerance = 2 * torch.finfo(dtype).eps / temperature + 1e-6
        torch.testing.assert_close(leaf.grad.double(), grad_truth, atol=tolerance, rtol=0)
    statistics = ppo_kernels.token_statistics(logits, tokens, **options)
    torch.testing.assert_close(statistics.max_prob.double(), 1 / count.double(), atol=1e-6, rtol=0)
    assert statistics.top1.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (128, 1031))
def test_divergence_from_a_reference_that_a_mask_left_uniform(backend, vocabulary, dtype):
    rows, _ = huge_rows(vocabulary, dtype)
    logits = 2 * torch.randn(3, vocabulary).to(dtype)
    truth = torch.log_softmax(logits.double(), -1)
    truth = (truth.exp() * (truth - truth.new_tensor(1 / vocabulary).log())).sum(-1)
    for row in (0, 2):
        leaf = logits.clone().requires_grad_()
        kl = ppo_kernels.kl_divergence(leaf, rows[[row] * 3], backend=backend)
        torch.testing.assert_close(kl.detach().double(), truth, atol=1e-5, rtol=0)
        kl.sum().backward()
        assert leaf.grad.isfinite().all()
    itself = ppo_kernels.kl_divergence(rows, rows, backend=backend)
    assert (itself == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_logprobs_of_tokens_at_the_lower_end_of_the_range_are_finite(backend, dtype, group_of_one):
    """As in eager PyTorch: it is their exponents in base 2 that are beyond it."""
    low = torch.finfo(dtype).min
    logits, tokens = torch.tensor([[0.0, low, 0.0]], dtype=dtype), torch.tensor([1])
    options = {"backend": backend}
    place = options | {"group": group_of_one, "vocab_start": 0}
    old, advantage = torch.tensor([-1.0], dtype=dtype), torch.ones(1, dtype=dtype)
    loss = ppo_kernels.ppo_loss(logits, tokens, old, advantage, **options)
    for logprob in (
        ppo_kernels.token_logprobs(logits, tokens, **options),
        ppo_kernels.token_statistics(logits, tokens, **options).logprobs,
        ppo_kernels.vocab_parallel_token_logprobs_and_entropy(logits, tokens, **place).logprobs,
        loss.logprobs,
    ):
        assert logprob.item() == pytest.approx(low, rel=1e-6)
    assert loss.loss.item() == pytest.approx(0.0, abs=1e-30)


def test_a_temperature_as_small_as_its_type_holds(backend):
    """Equal logits stay equally likely, and the largest takes all from another."""
    for temperature in (1e-40, torch.full((2,), 1e-40, dtype=torch.float64)):
        logits, tokens = torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.tensor([0, 1])
        logprobs = ppo_kernels.token_logprobs(
            logits, tokens, temperature=temperature, backend=backend
        )
        torch.testing.assert_close(logprobs, torch.tensor([-math.log(2.0), 0.0]))
