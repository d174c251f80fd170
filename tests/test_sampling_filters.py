"""What `sample_tokens` keeps is what the logits processors of transformers keep."""

import functools

import pytest
import torch

from ppo_kernels import sample_tokens
from tests.conftest import emulates_a_gpu
from tests.sampling import assert_drawn

FILTERS = (
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.0},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.037},
    {"min_p": 0.61},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 9, "min_p": 0.2},
    {"top_p": 0.9, "min_p": 0.013},
    {"top_k": 50, "top_p": 0.93, "min_p": 0.03},
)


@pytest.fixture(autouse=True)
def stable_sort(monkeypatch):
    """`TopPLogitsWarper` leaves it to `torch.sort` which of equal scores come first, and that, on a
    CPU with AVX2, to chance. How many it keeps of them does not depend on it."""
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))


def kept_by_transformers(logits, temperature, top_k=None, top_p=None, min_p=None):
    """The scores, -inf where they are removed, as `generate` has them."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1:
        scores = processors.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k is not None:
        scores = processors.TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None and top_p < 1:
        scores = processors.TopPLogitsWarper(top_p)(None, scores)
    if min_p is not None:
        scores = processors.MinPLogitsWarper(min_p)(None, scores)
    return scores


def assert_kept(backend, logits, temperature=1.0, **filters):
    """From the first of the kept ids to the last, each with its share of what is kept."""
    scores = kept_by_transformers(logits, temperature, **filters)
    numbers = torch.tensor([0.0, 0.8, 0.3, 1 - 2**-53], dtype=torch.float64)
    if emulates_a_gpu(backend):
        numbers, logits, scores = numbers[:2], logits[:1], scores[:1]
    shape = len(numbers), *logits.shape
    uniforms = numbers[:, None].expand(shape[:2])
    result = sample_tokens(
        logits.expand(shape), uniforms, temperature=temperature, **filters, backend=backend
    )
    assert_drawn(result, scores.expand(shape), uniforms)
    assert torch.equal(result.tokens[0], (scores > -torch.inf).int().argmax(-1))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_keeps_what_transformers_keeps(backend, filters, temperature):
    if emulates_a_gpu(backend) and temperature == 1:
        pytest.skip("too long without a GPU")
    logits = 3 * torch.randn(2, 150 if emulates_a_gpu(backend) else 600)
    logits[1, ::2] = -torch.inf
    assert_kept(backend, logits, temperature, **filters)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_keeps_of_equal_logits_what_transformers_keeps(backend, filters, dtype):
    """Dozens of ids at each value: where the cut goes through them, their order decides."""
    if emulates_a_gpu(backend) and dtype == torch.float32:
        pytest.skip("too long without a GPU")
    logits = (2 * torch.randn(2, 100 if emulates_a_gpu(backend) else 500)).round().to(dtype) / 2
    logits[1] = 0.75
    assert_kept(backend, logits, **filters)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16), ids=str)
@pytest.mark.parametrize("filters", FILTERS[-1:], ids=str)
def test_other_dtypes(backend, dtype, filters):
    assert_kept(backend, (2 * torch.randn(2, 300)).to(dtype), 0.8, **filters)


@pytest.mark.parametrize("filters", FILTERS[-1:], ids=str)
def test_a_real_vocabulary(backend, filters):
    vocabulary = 1101 if emulates_a_gpu(backend) else 50257
    assert_kept(backend, 4 * torch.randn(2, vocabulary), 0.9, **filters)


@pytest.mark.parametrize(
    ("count", "top_p", "kept"),
    [(4, 0.5, [2, 3]), (10, 0.9, range(1, 10)), (5, 0.0, [4])],
)
def test_of_equal_probabilities_the_last_ids_stay(backend, count, top_p, kept):
    """Those of which the cumulative probability is above 1 - top_p, in fp32."""
    draws = 2 * count
    logits, uniforms = torch.full((draws, count), 1.25), (torch.arange(draws) + 0.5) / draws
    tokens, logprobs = sample_tokens(logits, uniforms, top_p=top_p, backend=backend)
    assert tokens.unique().tolist() == list(kept)
    scores = kept_by_transformers(logits[:1], 1.0, top_p=top_p)
    assert (scores[0] > -torch.inf).nonzero()[:, 0].tolist() == list(kept)
    torch.testing.assert_close(logprobs, torch.full((draws,), -torch.tensor(len(kept)).log()))


def test_zeros_of_either_sign_are_equal(backend):
    logits = torch.tensor([0.0, -0.0, -5.0, 0.0, -0.0]).expand(5, -1)
    uniforms = (torch.arange(5) + 0.5) / 5
    for options, kept in (({"top_k": 1}, [0, 1, 3, 4]), ({"top_p": 0.3}, [3, 4])):
        tokens = sample_tokens(logits, uniforms, **options, backend=backend).tokens
        assert tokens.unique().tolist() == kept


def test_scores_that_a_temperature_makes_equal_are_ties(backend):
    """1.75 and its upper neighbour divided by 1.6 are one number of fp32."""
    upper = torch.nextafter(torch.tensor(1.75), torch.tensor(4.0))
    logits = torch.tensor([1.75, upper, 0.0]).expand(4, -1)
    assert logits[0, 0] / 1.6 == logits[0, 1] / 1.6
    uniforms = (torch.arange(4) + 0.5) / 4
    tokens = sample_tokens(logits, uniforms, temperature=1.6, top_k=1, backend=backend).tokens
    assert tokens.unique().tolist() == [0, 1]
