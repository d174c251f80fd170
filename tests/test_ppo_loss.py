"""ppo_loss and ppo_loss_: values, gradients, masks, errors."""

import math

import pytest
import torch

from ppo_kernels import PPOLoss, check_logprobs, ppo_loss, schemas, value_loss
from tests.conftest import (
    DTYPES,
    assert_as_exact_as_eager,
    awkward_rows,
    emulates_a_gpu,
    likeliest,
    loss_inputs,
    on_default_device,
    ppo_loss_truth,
    run_ppo_loss,
    skip_if_emulated,
    softmax_truth,
    waits_for_nothing,
)

OPTIONS = {
    "plain": {},
    "asymmetric clip": {"clip_low": 0.1, "clip_high": 0.3},
    "dual clip": {"dual_clip": 1.2},
    "entropy": {"entropy_coef": 0.3},
    "k1": {"kl_coef": 0.5, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.5, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.5, "kl_estimator": "k3"},
    "abs": {"kl_coef": 0.5, "kl_estimator": "abs"},
    "temperature": {"temperature": 0.7},
    "denominator": {"denominator": 100},
    "all": {
        "clip_low": 0.1,
        "clip_high": 0.3,
        "dual_clip": 1.3,
        "entropy_coef": 0.1,
        "kl_coef": 0.2,
        "kl_estimator": "k3",
        "temperature": 1.4,
        "denominator": 17.5,
    },
}


def test_worked_example_of_the_total(backend):
    """Policy loss + 0.5 value loss - 0.01 entropy, on one token of probability 1/4 out of 4."""
    logits = torch.zeros(1, 4, dtype=torch.float64)
    logprobs = torch.tensor([math.log(1 / 4)], dtype=torch.float64)
    policy = ppo_loss(
        logits,
        torch.tensor([2]),
        logprobs - math.log(1.1),
        torch.tensor([2.0]),
        entropy_coef=0.01,
        backend=backend,
    )
    values = torch.tensor([3.0]), torch.tensor([3.0]), torch.tensor([5.0])
    critic = value_loss(*values, backend=backend)
    total = policy.loss + 0.5 * critic.loss
    assert policy.policy_loss.item() == pytest.approx(-2.2, abs=1e-12)
    assert policy.entropy.item() == pytest.approx(math.log(4), abs=1e-12)
    assert critic.loss.item() == pytest.approx(2.0)
    assert total.item() == pytest.approx(-2.2 + 0.5 * 2.0 - 0.01 * math.log(4), abs=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_matches_the_formulas(backend, function, options):
    inputs, options = loss_inputs(4, 6, 50, torch.float64), OPTIONS[options]
    truth, grad_truth = ppo_loss_truth(**inputs, **options)
    result, grad = run_ppo_loss(function, inputs, **options, backend=backend)
    for name, ours, true in zip(PPOLoss._fields, result, truth, strict=True):
        torch.testing.assert_close(ours, true, atol=1e-12, rtol=0, msg=name)
    torch.testing.assert_close(grad, grad_truth, atol=1e-13, rtol=0)
    assert (grad[~inputs["mask"]] == 0).all()


def test_some_tokens_are_clipped_either_way():
    """Otherwise the formulas above would not be tried."""
    truth, _ = ppo_loss_truth(**loss_inputs(4, 6, 50, torch.float64))
    assert 0.15 < truth.clip_fraction < 0.85


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (1, 2, 7, 1031, 16385, 50257, 151936))
def test_as_exact_as_eager(backend, function, vocabulary, dtype):
    """`reference` is eager here; a denominator of 1 keeps gradients near 1."""
    rows = 3 if vocabulary > 10000 or emulates_a_gpu(backend) else 15
    inputs = loss_inputs(1, rows, vocabulary, dtype)
    options = OPTIONS["all"] | {"denominator": 1}
    truth, grad_truth = ppo_loss_truth(**inputs, **options)
    eager, eager_grad = run_ppo_loss(ppo_loss, inputs, **options, backend="reference")
    result, grad = run_ppo_loss(function, inputs, **options, backend=backend)
    for ours, theirs, true in zip(
        (*result, grad), (*eager, eager_grad), (*truth, grad_truth), strict=True
    ):
        assert_as_exact_as_eager(ours, theirs, true, scale=inputs["tokens"].numel())
    assert grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (130, 40000))
def test_awkward_rows(backend, function, vocabulary, dtype):
    for row in awkward_rows(vocabulary).to(dtype):
        tokens = likeliest(row[None])
        logprobs = softmax_truth(row[None], tokens, 1.0)[0].to(schemas.result_dtype(row))
        inputs = {
            "logits": row[None],
            "tokens": tokens,
            "old_logprobs": logprobs + 0.1,
            "advantages": torch.tensor([-1.0]),
            "ref_logprobs": logprobs - 0.2,
        }
        options = {"entropy_coef": 0.5, "kl_coef": 0.5}
        truth, grad_truth = ppo_loss_truth(**inputs, **options)
        eager, eager_grad = run_ppo_loss(ppo_loss, inputs, **options, backend="reference")
        result, grad = run_ppo_loss(function, inputs, **options, backend=backend)
        for ours, theirs, true in zip(
            (*result, grad), (*eager, eager_grad), (*truth, grad_truth), strict=True
        ):
            assert_as_exact_as_eager(ours, theirs, true)
        assert (grad[row[None] == -torch.inf] == 0).all()


def test_a_constant_added_to_logits_changes_nothing(backend, function):
    inputs = loss_inputs(3, 4, 40000)
    inputs["logits"] = (inputs["logits"] + 1e4) - 1e4
    inputs["old_logprobs"] = torch.log_softmax(inputs["logits"], -1).gather(
        -1, inputs["tokens"][..., None]
    )[..., 0]
    options = {"entropy_coef": 0.1, "denominator": 1, "backend": backend}
    plain, grad = run_ppo_loss(function, inputs, **options)
    shifted, shifted_grad = run_ppo_loss(
        function, inputs | {"logits": inputs["logits"] + 1e4}, **options
    )
    # A sum over twelve tokens.
    torch.testing.assert_close(shifted.loss, plain.loss, atol=1e-2, rtol=0)
    torch.testing.assert_close(shifted.logprobs, plain.logprobs, atol=1e-3, rtol=0)
    torch.testing.assert_close(shifted_grad, grad, atol=1e-3, rtol=0)


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_masked_out_rows_are_not_read(backend, function, garbage):
    inputs = loss_inputs(3, 5, 40000)
    options = {"entropy_coef": 0.1, "kl_coef": 0.1, "backend": backend}
    clean, clean_grad = run_ppo_loss(function, inputs, **options)
    out = ~inputs["mask"]
    for name in ("logits", "old_logprobs", "advantages", "ref_logprobs"):
        inputs[name] = inputs[name].clone()
        inputs[name][out] = garbage
    inputs["tokens"] = inputs["tokens"].masked_fill(out, -100)
    dirty, dirty_grad = run_ppo_loss(function, inputs, **options)
    for a, b in zip((*clean, clean_grad), (*dirty, dirty_grad), strict=True):
        assert torch.equal(a, b)
    assert (dirty_grad[out] == 0).all()
    assert (dirty.logprobs[out] == 0).all()
    assert (dirty.token_entropy[out] == 0).all()


@pytest.mark.parametrize("shape", ((2, 3), (2, 0), (0,)))
def test_without_a_counted_token_loss_and_gradient_are_zero(backend, function, shape):
    inputs = {
        "logits": torch.full((*shape, 9), math.nan),
        "tokens": torch.full(shape, 9),
        "old_logprobs": torch.full(shape, math.nan),
        "advantages": torch.ones(shape),
        "mask": torch.zeros(shape, dtype=torch.bool),
        "ref_logprobs": torch.ones(shape),
    }
    options = {"entropy_coef": 0.1, "kl_coef": 0.1, "backend": backend}
    for denominator in (None, 0, 5):
        result, grad = run_ppo_loss(function, inputs, denominator=denominator, **options)
        assert all((x == 0).all() for x in (*result, grad))


@pytest.mark.parametrize("shape", ((), (1,), (65537,)))
def test_row_counts(backend, function, shape):
    if shape == (65537,):
        skip_if_emulated(backend)
    logits = torch.randn(*shape, 7, dtype=torch.float64)
    tokens = torch.randint(7, shape)
    inputs = {
        "logits": logits,
        "tokens": tokens,
        "old_logprobs": torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0] - 0.1,
        "advantages": torch.randn(shape),
    }
    truth, grad_truth = ppo_loss_truth(**inputs, entropy_coef=0.1, denominator=1.0)
    result, grad = run_ppo_loss(
        function, inputs, entropy_coef=0.1, denominator=1.0, backend=backend
    )
    torch.testing.assert_close(result.loss, truth.loss, atol=1e-9, rtol=1e-12)
    torch.testing.assert_close(grad, grad_truth, atol=1e-12, rtol=0)


def refused(function, inputs, backend, message):
    """The loss raises or, where that would wait for a GPU, is NaN and `check_logprobs` raises."""
    if waits_for_nothing(backend):
        result, _ = run_ppo_loss(function, inputs, backend=backend)
        assert result.loss.isnan()
        with pytest.raises(ValueError, match=message):
            check_logprobs(result.logprobs, inputs["tokens"], inputs["mask"])
        return
    with pytest.raises(ValueError, match=message):
        run_ppo_loss(function, inputs, backend=backend)


@pytest.mark.parametrize("vocabulary", (130, 40000))
def test_impossible_token_is_named(backend, function, vocabulary):
    inputs = loss_inputs(2, 3, vocabulary)
    inputs["logits"][1, 1, inputs["tokens"][1, 1]] = -torch.inf
    token = inputs["tokens"][1, 1].item()
    message = rf"tokens must have finite log-prob.*-inf for token {token} at \[1, 1\].*mask it out"
    refused(function, inputs, backend, message)
    inputs["mask"][1, 1] = False
    _, grad = run_ppo_loss(function, inputs, backend=backend)
    assert grad.isfinite().all()


def test_nan_logits_are_named(backend, function):
    inputs = loss_inputs(2, 3, 40000)
    inputs["logits"][1, 2, 8000] = math.nan
    refused(function, inputs, backend, r"log-probability, got nan .* at \[1, 2\]")


@pytest.mark.parametrize("bad", (-1, 50))
def test_ids_out_of_range_are_named(backend, function, bad):
    inputs = loss_inputs(2, 3, 50)
    inputs["tokens"][1, 1] = bad
    message = rf"tokens must be in \[0, 50\), got {bad} at \[1, 1\]"
    if waits_for_nothing(backend):
        message = rf"got nan for token {bad} at \[1, 1\]"
    refused(function, inputs, backend, message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.ones(2, 3, 9).int()}, TypeError, "logits must be float32.*int32"),
        ({"tokens": torch.ones(2, 3)}, TypeError, "tokens must be an int64 or int32.*float32"),
        ({"tokens": torch.ones(2, 4).int()}, ValueError, r"tokens must have shape \(2, 3\)"),
        ({"old_logprobs": torch.ones(2)}, ValueError, r"old_logprobs must have shape \(2, 3\)"),
        ({"advantages": torch.ones(2, 3).int()}, TypeError, "advantages must be float32.*int32"),
        ({"advantages": torch.ones(2, 1)}, ValueError, r"advantages must have shape \(2, 3\)"),
        (
            {"advantages": torch.ones(2, 3, device="meta")},
            ValueError,
            "advantages must be on .*got meta",
        ),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor.*float32"),
        ({"mask": torch.ones(3, 2).bool()}, ValueError, r"mask must have shape \(2, 3\)"),
        ({"clip_low": -0.1}, ValueError, "clip_low must be >= 0, got -0.1"),
        ({"clip_low": 1.5}, ValueError, "clip_low must be <= 1, got 1.5"),
        ({"clip_high": math.nan}, ValueError, "clip_high must be >= 0, got nan"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip must be > 1, got 1.0"),
        ({"entropy_coef": -1.0}, ValueError, "entropy_coef must be >= 0, got -1.0"),
        ({"entropy_coef": math.nan}, ValueError, "entropy_coef must be finite, got nan"),
        ({"kl_coef": -1.0}, ValueError, "kl_coef must be >= 0, got -1.0"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs must be given when kl_coef > 0"),
        ({"ref_logprobs": torch.ones(3)}, ValueError, r"ref_logprobs must have shape \(2, 3\)"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of k1, .*'k4'"),
        ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
        ({"denominator": -1}, ValueError, "denominator must be >= 0, got -1"),
        ({"denominator": torch.ones(2)}, ValueError, "denominator must have one element"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(backend, function, arguments, error, message):
    inputs = loss_inputs(2, 3, 9)
    del inputs["ref_logprobs"]
    with pytest.raises(error, match=message):
        function(**inputs | on_default_device(arguments), backend=backend)


def test_gradcheck(backend):
    inputs = loss_inputs(1, 3, 5, torch.float64)
    logits = inputs.pop("logits").requires_grad_()
    options = OPTIONS["all"] | {"backend": backend}
    assert torch.autograd.gradcheck(
        lambda z: ppo_loss(z, **inputs, **options).loss, logits, eps=1e-7, atol=1e-6
    )
