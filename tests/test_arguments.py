"""What every op takes for a number, a mask, advantages and weights, and what it refuses."""

import inspect
import math

import numpy
import pytest
import torch

import ppo_kernels
from ppo_kernels import clipped_policy_loss, masked_mean, objectives, ppo_loss, token_logprobs
from tests.calls import NAMES, calls
from tests.conftest import loss_inputs, waits_for_nothing

CALLS = calls()
LOSSES = tuple(name for name in NAMES if "advantages" in CALLS[name].constants)
OF_BACKENDS = tuple(name for name in LOSSES if CALLS[name].takes_backend)
OBJECTIVES = tuple(name for name in LOSSES if name not in OF_BACKENDS)


def same(a, b):
    for x, y in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def of_sequences(name, backend):
    call = calls()[name]
    advantages, weights = torch.tensor([0.7, -1.3]), torch.tensor([0.2, 2.5])
    one_each = {
        "advantages": advantages[:, None].expand(2, 3),
        "importance_weights": weights[:, None].expand(2, 3),
    }
    one_per_sequence = {"advantages": advantages, "importance_weights": weights}
    same(
        call.results_and_gradients(backend, **one_per_sequence),
        call.results_and_gradients(backend, **one_each),
    )


@pytest.mark.parametrize("name", OF_BACKENDS)
def test_one_advantage_and_weight_per_sequence(backend, name):
    of_sequences(name, backend)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_advantage_and_weight_per_sequence_in_objectives(name):
    of_sequences(name, "reference")


def test_weights_are_factors_of_each_tokens_policy_loss(backend):
    """Of the terms one by one: clipped, dual-clipped and free ones; entropy and KL have none."""
    inputs = loss_inputs(3, 5, 11, torch.float64)
    mask, weights = inputs["mask"], torch.rand(3, 5, dtype=torch.float64) * 3
    weights[0, 0] = 0.0
    weights[~mask] = math.nan
    options = {"dual_clip": 1.5, "clip_low": 0.1}
    plain = ppo_loss(**inputs, **options, entropy_coef=0.1, kl_coef=0.2, backend=backend)
    weighted = ppo_loss(
        **inputs,
        **options,
        importance_weights=weights,
        entropy_coef=0.1,
        kl_coef=0.2,
        backend=backend,
    )
    per_token = plain.logprobs, inputs["old_logprobs"], inputs["advantages"]
    terms = [
        clipped_policy_loss(*of_token, **options, backend="reference").loss
        for of_token in zip(*(x[mask].split(1) for x in per_token), strict=True)
    ]
    expected = (torch.stack(terms) * weights[mask]).mean()
    torch.testing.assert_close(weighted.policy_loss, expected)
    assert weighted.policy_loss != plain.policy_loss
    for name in ("entropy", "kl", "approx_kl"):
        assert getattr(weighted, name) == getattr(plain, name)
    change = expected - plain.policy_loss
    torch.testing.assert_close(weighted.loss, plain.loss + change)


@pytest.mark.parametrize("bad", (-0.5, math.nan, math.inf))
def test_a_weight_that_is_none_is_named(backend, bad):
    inputs = loss_inputs(2, 3, 11)
    weights = torch.ones(2, 3)
    weights[1, 2] = bad
    if weights.is_cuda:
        pytest.skip("a GPU is not waited for")
    message = rf"importance_weights must be finite and >= 0, got {bad}.*\[1, 2\]"
    with pytest.raises(ValueError, match=message):
        ppo_loss(**inputs, importance_weights=weights, backend=backend)


@pytest.mark.parametrize("name", LOSSES)
def test_advantages_of_another_shape_are_named(name):
    with pytest.raises(ValueError, match=r"advantages must have shape \(2, 3\), or \(2,\)"):
        calls()[name]("reference", advantages=torch.ones(3))


@pytest.mark.parametrize("dtype", (torch.int64, torch.float32), ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if "mask" in CALLS[name].constants])
def test_a_mask_of_numbers_is_told_how_to_be_one(name, dtype):
    call = calls()[name]
    message = rf"mask must be a bool tensor, got {dtype}: take mask\.bool\(\)"
    with pytest.raises(TypeError, match=message):
        call("reference", mask=call.constants["mask"].to(dtype))


NUMBERS = {
    "temperature": ("token_logprobs", "ppo_loss", "linear_ppo_loss", "kl_divergence"),
    "clip_low": LOSSES,
    "clip_high": LOSSES,
    "entropy_coef": ("ppo_loss", "ppo_loss_", "linear_ppo_loss"),
    "kl_coef": ("ppo_loss", "ppo_loss_", "linear_ppo_loss"),
    "denominator": ("ppo_loss", "linear_ppo_loss", "clipped_policy_loss", "value_loss"),
    "dual_clip": ("ppo_loss", "linear_ppo_loss", "clipped_policy_loss"),
    "clip": ("value_loss",),
    "eps": ("masked_whiten",),
    "softcap": ("linear_token_logprobs",),
    "logit_scale": ("linear_token_logprobs",),
    "gamma": ("gae", "gae_packed"),
    "lam": ("gae", "gae_packed"),
    "cap": ("objectives.tis",),
}
KINDS = (numpy.float64, numpy.float32, numpy.array, torch.tensor)


@pytest.mark.parametrize("number", NUMBERS)
def test_numpy_scalars_and_0d_tensors_are_numbers(number):
    value = 1.5 if number in ("dual_clip", "denominator") else 0.5
    for name in NUMBERS[number]:
        call = calls()[name]
        if number == "temperature":
            call.constants.pop(number)
        expected = call.results_and_gradients("auto", **{number: value})
        for kind in KINDS:
            same(call.results_and_gradients("auto", **{number: kind(value)}), expected)


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (torch.tensor([0.1]), r"a tensor of shape \(1,\) on "),
        (torch.tensor(0.1, requires_grad=True), "requires_grad=True"),
        (torch.tensor(0.1, device="meta"), "on meta"),
        (numpy.array([0.1]), "got ndarray"),
        ("0.1", "got str"),
        (None, "got NoneType"),
    ],
    ids=repr,
)
def test_what_is_no_number_is_named(bad, got):
    with pytest.raises(TypeError, match=f"kl_coef must be a Python number.*{got}"):
        calls()["ppo_loss"](kl_coef=bad)


def test_one_temperature_of_a_0d_tensor_need_not_be_known(backend):
    """It is one of each token, so that a GPU is not waited for; its values are looked at there."""
    logits, tokens = torch.randn(2, 3, 11), torch.randint(11, (2, 3))
    expected = token_logprobs(logits, tokens, temperature=0.7, backend=backend)
    got = token_logprobs(logits, tokens, temperature=torch.tensor(0.7), backend=backend)
    torch.testing.assert_close(got, expected)
    if not waits_for_nothing(backend):
        with pytest.raises(ValueError, match="temperature must be finite and > 0"):
            token_logprobs(logits, tokens, temperature=torch.tensor(-0.7), backend=backend)


def without_upper_clip(function):
    """(advantage, ratio) -> loss, clipped from below alone."""
    for advantage, ratio, loss, clipped in (
        (2.0, 10.0, -20.0, 0.0),
        (-2.0, 0.5, 1.6, 1.0),
        (-2.0, 10.0, 20.0, 0.0),
    ):
        logprobs = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
        arguments = torch.zeros(1, 1).double(), torch.full((1, 1), advantage).double()
        result = function(logprobs, *arguments, clip_high=math.inf)
        result.loss.backward()
        assert result.loss.item() == pytest.approx(loss)
        assert result.clip_fraction.item() == clipped
        assert logprobs.grad.item() == pytest.approx(0.0 if clipped else loss)


def test_clip_high_may_be_inf(backend):
    without_upper_clip(lambda *x, **y: clipped_policy_loss(*x, **y, backend=backend))


@pytest.mark.parametrize("objective", (objectives.ppo, objectives.dapo))
def test_clip_high_of_objectives_may_be_inf(objective):
    without_upper_clip(objective)


@pytest.mark.parametrize("name", ("ppo_loss", "ppo_loss_", "linear_ppo_loss"))
def test_clip_high_of_a_loss_from_logits_may_be_inf(backend, name):
    """As a bound that no ratio reaches, and NaN is still refused."""
    call = calls()[name]
    same(
        call.results_and_gradients(backend, clip_high=math.inf),
        call.results_and_gradients(backend, clip_high=1e9),
    )
    with pytest.raises(ValueError, match="clip_high must be >= 0, got nan"):
        call(backend, clip_high=math.nan)


def tensors_of(call):
    return call.differentiable | call.constants


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", (torch.strided, torch.jagged), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nested_tensors_are_told_to_be_padded(name, layout):
    call = calls()[name]
    for argument, x in tensors_of(call).items():
        nested = torch.nested.nested_tensor([x, x], layout=layout)
        with pytest.raises(TypeError, match=f"{argument} must have one shape, got a nested tensor"):
            call("auto", **{argument: nested})


class _DTensor(torch.Tensor):
    """What is asked of a DTensor: that of torch needs a process group."""

    def full_tensor(self):
        raise AssertionError


@pytest.mark.parametrize("name", NAMES)
def test_dtensors_are_told_what_to_take(name):
    call = calls()[name]
    for argument, x in tensors_of(call).items():
        remedy = rf"{argument}\.full_tensor\(\), or a vocab_parallel_\* op"
        with pytest.raises(TypeError, match=f"{argument} must be a plain tensor.*{remedy}"):
            call("auto", **{argument: x.as_subclass(_DTensor)})


def test_parameters_are_plain_tensors(backend):
    x = torch.nn.Parameter(torch.randn(3))
    assert masked_mean(x, backend=backend).requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_dual_clip_may_be_inf(name):
    call = calls()[name]
    if "dual_clip" not in inspect.signature(call.function).parameters:
        pytest.skip("no dual clip")
    same(
        call.results_and_gradients("auto", dual_clip=math.inf),
        call.results_and_gradients("auto", dual_clip=None),
    )


def test_a_temperature_of_the_cpu_is_a_number_elsewhere():
    logits, tokens = torch.empty(2, 5, device="meta"), torch.zeros(2, dtype=int, device="meta")
    for one in (torch.tensor(0.7), torch.tensor(2)):
        assert token_logprobs(logits, tokens, temperature=one).shape == (2,)
    logits, tokens = torch.randn(2, 5), torch.zeros(2, dtype=int)
    torch.testing.assert_close(
        token_logprobs(logits, tokens, temperature=torch.tensor(2)),
        token_logprobs(logits, tokens, temperature=2),
    )


def test_vocab_start_may_be_of_numpy(group_of_one):
    logits, tokens = torch.randn(2, 5), torch.zeros(2, dtype=int)
    for start in (numpy.int64(0), torch.tensor(0)):
        ppo_kernels.vocab_parallel_token_logprobs_and_entropy(
            logits, tokens, group=group_of_one, vocab_start=start
        )
