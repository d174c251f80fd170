"""kept_token_logprobs_and_entropy and kept_from_mask, against their plain form and samplers."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ppo_kernels import (
    kept as module,
)
from ppo_kernels import (
    kept_from_mask,
    kept_token_logprobs_and_entropy,
    reference,
    token_logprobs_and_entropy,
)
from tests.conftest import DTYPES, assert_as_exact_as_eager, awkward_rows, softmax_truth

TEMPERATURES = torch.tensor([[0.3, 1.0, 0.7, 1.3], [1.7, 0.4, 2.5, 1.0]])


def drawn(vocabulary=60, dtype=torch.float64, share=0.3):
    """Logits (2, 4, V), a mask of what was kept of them, and a kept token of each row."""
    logits = (3 * torch.randn(2, 4, vocabulary)).to(dtype)
    tokens = torch.randint(vocabulary, (2, 4))
    kept = (torch.rand(2, 4, vocabulary) < share).scatter(-1, tokens[..., None], True)
    return logits, tokens, kept


def gradients(function, logits, *arguments, **options):
    """logprobs, entropy and the gradient of logprobs - entropy / 2 where neither is NaN."""
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = function(leaf, *arguments, **options)
    (logprobs - 0.5 * entropy).nansum().backward()
    return logprobs.detach(), entropy.detach(), leaf.grad


def test_matches_a_hand_computed_row():
    """Probabilities 3/8 and 4/8 of eight parts become 3/7 and 4/7; the rest is not there."""
    logits = torch.tensor([[0.0, math.log(3), math.log(4)]], dtype=torch.float64)
    logits.requires_grad_()
    kept = torch.tensor([2, 1]), torch.tensor([0, 2])
    logprobs, entropy = kept_token_logprobs_and_entropy(logits, torch.tensor([1]), *kept)
    assert logprobs.item() == pytest.approx(math.log(3 / 7), abs=1e-15)
    by_hand = -(3 / 7 * math.log(3 / 7) + 4 / 7 * math.log(4 / 7))
    assert entropy.item() == pytest.approx(by_hand, abs=1e-15)
    logprobs.backward()
    by_hand = torch.tensor([[0, 4 / 7, -4 / 7]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, by_hand, atol=1e-15, rtol=0)


def test_kept_from_mask():
    mask = torch.tensor([[[False, True, True]], [[False, False, False]], [[True, False, True]]])
    ids, offsets = kept_from_mask(mask)
    assert ids.tolist() == [1, 2, 0, 2]
    assert offsets.tolist() == [0, 2, 2, 4]
    for empty in (mask[:0], mask[..., :1, :].expand(3, 0, 3)):
        assert [x.tolist() for x in kept_from_mask(empty)] == [[], [0]]
    for bad, error in ((mask.int(), TypeError), (torch.tensor(True), ValueError)):
        with pytest.raises(error, match="must"):
            kept_from_mask(bad)


@pytest.mark.parametrize("temperature", (1.0, 0.7, TEMPERATURES, TEMPERATURES.bfloat16()))
def test_matches_the_plain_form(temperature):
    logits, tokens, kept = drawn()
    arguments = logits, tokens, *kept_from_mask(kept)
    ours = gradients(kept_token_logprobs_and_entropy, *arguments, temperature=temperature)
    plain = gradients(
        reference.kept_token_logprobs_and_entropy, *arguments, temperature=temperature
    )
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y, atol=1e-13, rtol=0)
    assert (ours[2][~kept] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_eager(dtype):
    logits, tokens, kept = drawn(5000, dtype)
    arguments = logits, tokens, *kept_from_mask(kept)
    ours = gradients(kept_token_logprobs_and_entropy, *arguments, temperature=0.8)
    eager = gradients(reference.kept_token_logprobs_and_entropy, *arguments, temperature=0.8)
    truth = softmax_truth(logits.masked_fill(~kept, -torch.inf), tokens, 0.8)
    truth = *truth[:2], truth[2] - 0.5 * truth[3]
    for x, y, true in zip(ours, eager, truth, strict=True):
        assert_as_exact_as_eager(x, y, true)
    assert ours[0].dtype == ours[1].dtype == (torch.float64 if dtype.itemsize == 8 else torch.float)
    assert ours[2].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_rows_kept_whole_are_token_logprobs_and_entropy(dtype):
    """-inf among the kept, outliers, large and equal logits."""
    logits = awkward_rows(1000).to(dtype)
    tokens, kept = logits.argmax(-1), kept_from_mask(torch.ones_like(logits, dtype=torch.bool))
    ours = gradients(kept_token_logprobs_and_entropy, logits, tokens, *kept)
    eager = gradients(token_logprobs_and_entropy, logits, tokens, backend="reference")
    truth = softmax_truth(logits, tokens, 1.0)
    truth = *truth[:2], truth[2] - 0.5 * truth[3]
    for x, y, true in zip(ours, eager, truth, strict=True):
        assert_as_exact_as_eager(x, y, true)
    assert (ours[2][logits == -torch.inf] == 0).all()
    shifted = kept_token_logprobs_and_entropy(logits.double() + 1e4, tokens, *kept)
    for x, y in zip(shifted, ours, strict=False):
        torch.testing.assert_close(x.float(), y.float(), atol=1e-3, rtol=0)


def test_many_kept_ids_lose_no_digits():
    logits, tokens = torch.randn(1, 150_000), torch.tensor([7])
    kept = kept_from_mask(torch.ones_like(logits, dtype=torch.bool))
    truth = softmax_truth(logits, tokens, 1.0)
    for x, true in zip(kept_token_logprobs_and_entropy(logits, tokens, *kept), truth, strict=False):
        torch.testing.assert_close(x.double(), true, atol=1e-6, rtol=0)


def test_one_kept_id_is_certain():
    logits, tokens, _ = drawn()
    ours = gradients(
        kept_token_logprobs_and_entropy, logits, tokens, tokens.flatten(), torch.arange(9)
    )
    assert all((x == 0).all() for x in ours)


@pytest.mark.parametrize("temperature", (0.7, TEMPERATURES))
def test_agrees_with_the_samplers_of_transformers(temperature):
    """The log of the very probabilities that a token is drawn from."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = (3 * torch.randn(8, 1000)).float()
    column = torch.as_tensor(temperature).expand(2, 4).reshape(8, 1)
    filtered = warpers.TopKLogitsWarper(50)(None, logits / column)
    filtered = warpers.TopPLogitsWarper(0.9)(None, filtered)
    filtered = warpers.MinPLogitsWarper(0.01)(None, filtered)
    probabilities = filtered.softmax(-1)
    tokens = probabilities.multinomial(1).view(2, 4)
    ids, offsets = kept_from_mask(filtered > -torch.inf)
    assert 8 < ids.numel() < 8 * 50
    logprobs, entropy = kept_token_logprobs_and_entropy(
        logits.view(2, 4, -1), tokens, ids.int(), offsets.int(), temperature=temperature
    )
    expected = probabilities.gather(-1, tokens.view(8, 1)).log().view(2, 4)
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=0)
    expected = torch.special.entr(probabilities).sum(-1).view(2, 4)
    torch.testing.assert_close(entropy, expected, atol=1e-6, rtol=1e-6)


def test_masked_out_rows():
    """May keep nothing, or something with a token that is none, of logits that are none."""
    logits, tokens, kept = drawn()
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = mask[1, 3] = False
    clean = gradients(kept_token_logprobs_and_entropy, logits, tokens, *kept_from_mask(kept))
    kept[0, 1] = False
    logits[1, 0], tokens[1, 0], tokens[1, 3] = torch.nan, -7, 999
    temperature = torch.where(mask, 1.0, torch.nan)
    ours = gradients(
        kept_token_logprobs_and_entropy,
        *(logits, tokens, *kept_from_mask(kept), mask),
        temperature=temperature,
    )
    for x, y in zip(ours, clean, strict=True):
        assert torch.equal(x[mask], y[mask])
        assert (x[~mask] == 0).all()
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    none = torch.zeros_like(mask)
    ours = gradients(kept_token_logprobs_and_entropy, logits, tokens, *nothing, none)
    assert all((x == 0).all() for x in ours)


@pytest.mark.parametrize("shape", ((0,), (2, 0), (), (3, 1, 2)))
def test_shapes(shape):
    logits, tokens = torch.randn(*shape, 7, dtype=torch.float64), torch.randint(7, shape)
    kept = (torch.rand(*shape, 7) < 0.5).scatter(-1, tokens[..., None], True)
    arguments = logits, tokens, *kept_from_mask(kept)
    ours = gradients(kept_token_logprobs_and_entropy, *arguments)
    for x, y in zip(
        ours, gradients(reference.kept_token_logprobs_and_entropy, *arguments), strict=True
    ):
        torch.testing.assert_close(x, y, atol=1e-14, rtol=0)


def test_views_orders_and_places_change_no_bit():
    """Rows of a view, ids in another order of rows: a row depends on what it holds alone."""
    base, tokens, kept = drawn(200, torch.float32)
    tokens, kept = tokens[:, :-1], kept[:, :-1]
    logits = base[:, :-1]
    assert not logits.is_contiguous()
    viewed = gradients(kept_token_logprobs_and_entropy, logits, tokens, *kept_from_mask(kept))
    flat = logits.reshape(6, -1), tokens.reshape(6), kept.reshape(6, -1)
    order = torch.randperm(6)
    moved = gradients(
        kept_token_logprobs_and_entropy,
        *(flat[0][order], flat[1][order], *kept_from_mask(flat[2][order])),
    )
    for x, y in zip(viewed, moved, strict=True):
        assert torch.equal(x.flatten(0, 1)[order], y)


def test_no_row_of_the_vocabulary_is_read():
    """What is not kept may be anything; no memory of its size is taken in the forward."""
    logits, tokens, kept = drawn()
    expected = kept_token_logprobs_and_entropy(logits, tokens, *kept_from_mask(kept))
    dirty = logits.masked_fill(~kept, torch.nan)
    ours = kept_token_logprobs_and_entropy(dirty, tokens, *kept_from_mask(kept))
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    logits = torch.randn(4, 3, 40_000)[:, :-1]
    arguments = torch.zeros(4, 2).long(), torch.zeros(8).long(), torch.arange(9)
    with torch.profiler.profile(profile_memory=True) as profile:
        kept_token_logprobs_and_entropy(logits, *arguments)
    allocated = sum(max(0, x.self_cpu_memory_usage) for x in profile.events())
    assert allocated < logits.numel() / 10


def test_gradcheck_and_no_second_derivative():
    logits, tokens, kept = drawn(7)
    logits.requires_grad_()
    csr = kept_from_mask(kept)
    assert torch.autograd.gradcheck(
        lambda z: kept_token_logprobs_and_entropy(z, tokens, *csr, temperature=TEMPERATURES), logits
    )
    logprobs, _ = kept_token_logprobs_and_entropy(logits, tokens, *csr)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(logprobs.sum(), logits, create_graph=True)


@pytest.mark.parametrize("used", (0, 1))
def test_one_output_used_under_an_upstream_of_stride_0(used):
    logits, tokens, kept = drawn()
    logits.requires_grad_()
    output = kept_token_logprobs_and_entropy(logits, tokens, *kept_from_mask(kept))[used]
    (grad,) = torch.autograd.grad(output, logits, torch.tensor(2.5).double().expand(2, 4))
    truth = softmax_truth(logits.detach().masked_fill(~kept, -torch.inf), tokens, 1.0)[2 + used]
    torch.testing.assert_close(grad, 2.5 * truth, atol=1e-13, rtol=0)


GOOD = {
    "logits": torch.randn(2, 2, 9),
    "tokens": torch.tensor([[1, 5], [8, 0]]),
    "kept_ids": torch.tensor([0, 1, 5, 8, 7, 0]),
    "kept_offsets": torch.tensor([0, 2, 3, 5, 6]),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": torch.tensor([[1, 5], [3, 0]])}, ValueError, r"tokens .*got 3 at \[1, 0\]"),
        ({"tokens": torch.tensor([[1, 5], [8, 9]])}, ValueError, r"tokens .*got 9 at \[1, 1\]"),
        ({"kept_ids": torch.tensor([0, 1, 5, 9, 8, 0])}, ValueError, r"\[0, 9\), got 9 at \[3\]"),
        ({"kept_ids": torch.tensor([0, 1, 5, 8, -1, 0])}, ValueError, r"got -1 at \[4\]"),
        ({"kept_ids": torch.tensor([0, 1, 5, 8, 8, 0])}, ValueError, "8 twice in row 2"),
        ({"kept_offsets": torch.tensor([0, 2, 2, 5, 6])}, ValueError, r"got none at \[0, 1\]"),
        ({"kept_offsets": torch.tensor([0, 3, 2, 5, 6])}, ValueError, "must rise from 0 to 6"),
        ({"kept_offsets": torch.tensor([1, 2, 3, 5, 6])}, ValueError, "must rise from 0 to 6"),
        ({"kept_offsets": torch.tensor([0, 2, 3, 5, 5])}, ValueError, "must rise from 0 to 6"),
        ({"kept_offsets": torch.arange(4)}, ValueError, r"kept_offsets must have shape \(5,\)"),
        ({"kept_ids": torch.ones(2, 3).int()}, ValueError, r"kept_ids must have shape \(6,\)"),
        ({"kept_ids": torch.ones(6)}, TypeError, "kept_ids must be an int64 or int32"),
        ({"kept_offsets": torch.ones(5)}, TypeError, "kept_offsets must be an int64 or int32"),
        ({"kept_ids": torch.ones(6, device="meta").int()}, ValueError, "kept_ids must be on cpu"),
        ({"mask": torch.ones(2, 2)}, TypeError, "mask must be a bool tensor"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0"),
        ({"temperature": torch.ones(4)}, ValueError, r"temperature must have shape \(2, 2\)"),
        (
            {"temperature": torch.tensor([[1.0, 2.0], [0.0, 1.0]])},
            ValueError,
            r"temperature must be finite and > 0, got 0.0 at \[1, 0\]",
        ),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(arguments, error, message):
    kept_token_logprobs_and_entropy(**GOOD)
    with pytest.raises(error, match=message):
        kept_token_logprobs_and_entropy(**(GOOD | arguments))


def test_values_that_nobody_looked_at(monkeypatch):
    """On a GPU: NaN for a token that is not kept, or twice, or of a row that keeps nothing; and
    offsets that are none read nothing beyond the tensors."""
    monkeypatch.setattr(module, "_check_values", lambda *_: None)
    arguments = GOOD | {"tokens": torch.tensor([[2, 5], [8, 99]])}
    logprobs, entropy = kept_token_logprobs_and_entropy(**arguments)
    assert logprobs.isnan().tolist() == [[True, False], [False, True]]
    assert entropy.isfinite().all()
    twice = {"kept_ids": torch.tensor([0, 1, 5, 8, 8, 0])}
    assert kept_token_logprobs_and_entropy(**(GOOD | twice))[0][1, 0].isnan()
    empty = {"kept_offsets": torch.tensor([0, 2, 2, 5, 6])}
    assert all(x[0, 1].isnan() for x in kept_token_logprobs_and_entropy(**(GOOD | empty)))
    for offsets in ([-5, 2, 3, 5, 600], [3, 3, 3, 3, 3], [600, 5, 3, 2, -5]):
        kept_token_logprobs_and_entropy(**(GOOD | {"kept_offsets": torch.tensor(offsets)}))


def test_compiles_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    logits, tokens, kept = drawn()

    def scored(logits, temperature, *csr):
        logprobs, entropy = kept_token_logprobs_and_entropy(
            logits, tokens, *csr, temperature=temperature
        )
        return (logprobs - 0.5 * entropy).sum()

    compiled = torch.compile(scored, fullgraph=True, backend=counter)
    for temperature in (1.0, 0.9, 0.8):
        results = []
        for function in (compiled, scored):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, temperature, *kept_from_mask(kept))
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results)
        kept = kept | (torch.rand(kept.shape) < 0.1)
    # The second temperature and the second count of kept ids make them dynamic.
    assert counter.frame_count <= 2
