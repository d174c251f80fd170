"""A temperature for each token: token_logprobs, ppo_loss, ppo_loss_ and kl_divergence."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ppo_kernels import kl_divergence, ppo_loss, ppo_loss_, token_logprobs_and_entropy
from tests.conftest import (
    assert_as_exact_as_eager,
    log_softmax_truth,
    loss_inputs,
    needs_native,
    on_default_device,
    ppo_loss_truth,
    run_ppo_loss,
    skip_if_emulated,
    softmax_truth,
    waits_for_nothing,
)

SOME = torch.tensor([[0.3, 1.0, 0.7], [1.7, 0.4, 2.5]])
OPTIONS = {"entropy_coef": 0.1, "kl_coef": 0.2, "dual_clip": 1.5, "clip_high": 0.3}


def scored(logits, tokens, temperature, **options):
    """logprobs, entropy and the gradient of logprobs - entropy / 2."""
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(leaf, tokens, temperature=temperature, **options)
    (grad,) = torch.autograd.grad((logprobs - 0.5 * entropy).sum(), leaf)
    return logprobs.detach(), entropy.detach(), grad


def diverged(logits, ref_logits, temperature, **options):
    """kl_divergence and the gradient of its sum."""
    leaf = logits.detach().requires_grad_()
    kl = kl_divergence(leaf, ref_logits, temperature=temperature, **options)
    return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]


def kl_truth(logits, ref_logits, temperature):
    log_p, log_q = (log_softmax_truth(x, temperature) for x in (logits, ref_logits))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl, log_p.exp() * (log_p - log_q - kl[..., None]) / temperature


def forms():
    """Name -> temperatures (2, 3) as a caller may hold them."""
    wide = torch.full((2, 6), torch.nan)
    wide[:, ::2] = SOME
    return {
        "fp64": SOME.double(),
        "bf16": SOME.bfloat16(),
        "one per sequence": SOME[:, :1].expand(2, 3),
        "strided": wide[:, ::2],
    }


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("vocabulary", (50, 523, 40000))
def test_each_row_has_its_own(backend, vocabulary, dtype):
    """fp64 is compared with closed forms, and less with eager's error, which `reference` makes."""
    if vocabulary > 2000:
        skip_if_emulated(backend)
    logits, ref_logits = (3 * torch.randn(2, 2, 3, vocabulary)).to(dtype)
    tokens = torch.randint(vocabulary, (2, 3))
    temperature = SOME.to(torch.get_default_device())
    logprobs, entropy, by_logit, entropy_by_logit = softmax_truth(
        logits, tokens, temperature[..., None].double()
    )
    logprobs = logprobs, entropy, by_logit - 0.5 * entropy_by_logit
    results = scored(logits, tokens, temperature, backend=backend)
    eager = scored(logits, tokens, temperature, backend="reference")
    for ours, theirs, truth in zip(results, eager, logprobs, strict=True):
        assert_as_exact_as_eager(ours, theirs, truth)
    results = diverged(logits, ref_logits, temperature, backend=backend)
    eager = diverged(logits, ref_logits, temperature, backend="reference")
    truth = kl_truth(logits, ref_logits, temperature[..., None].double())
    for ours, theirs, true in zip(results, eager, truth, strict=True):
        assert_as_exact_as_eager(ours, theirs, true, scale=50)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_loss_of_tokens_sampled_at_different_temperatures(backend, function, dtype):
    inputs = loss_inputs(2, 3, 300, dtype)
    temperature = SOME.to(torch.get_default_device())
    column = temperature.double()[..., None]
    logprobs = softmax_truth(inputs["logits"], inputs["tokens"], column)[0]
    inputs["old_logprobs"] = (logprobs + 0.3 * torch.randn(2, 3, dtype=torch.float64)).to(dtype)
    inputs["ref_logprobs"] = (logprobs - 0.3 * torch.randn(2, 3, dtype=torch.float64)).to(dtype)
    truth, grad_truth = ppo_loss_truth(**inputs, **OPTIONS, temperature=column[inputs["mask"]])
    options = OPTIONS | {"temperature": temperature}
    result, grad = run_ppo_loss(function, inputs, **options, backend=backend)
    eager, eager_grad = run_ppo_loss(ppo_loss, inputs, **options, backend="reference")
    assert_as_exact_as_eager(grad, eager_grad, grad_truth)
    for ours, theirs, true in zip(result, eager, truth, strict=True):
        assert_as_exact_as_eager(ours, theirs, true, scale=6)


@pytest.mark.parametrize("form", forms())
def test_any_form_of_tensor_gives_what_a_plain_copy_gives(backend, form):
    temperature = forms()[form]
    plain = temperature.float().contiguous()
    inputs = loss_inputs(2, 3, 20)
    logits, tokens, other = inputs["logits"], inputs["tokens"], torch.randn(2, 3, 20)
    results = [
        (
            *scored(logits, tokens, x, backend=backend),
            *diverged(logits, other, x, backend=backend),
            run_ppo_loss(ppo_loss_, inputs, **OPTIONS, temperature=x, backend=backend)[1],
        )
        for x in (temperature, plain)
    ]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_equal_temperatures_are_bitwise_the_number(fused, dtype):
    """0.7 has no exact fp32: both divide in fp64."""
    inputs = loss_inputs(1, 3, 150, dtype)
    logits, tokens, other = inputs["logits"], inputs["tokens"], torch.randn(1, 3, 150).to(dtype)
    results = []
    for temperature in (0.7, torch.full((1, 3), 0.7, dtype=torch.float64)):
        options = {"temperature": temperature, "backend": fused}
        results.append([*scored(logits, tokens, **options), *diverged(logits, other, **options)])
        for function in (ppo_loss, ppo_loss_):
            result, grad = run_ppo_loss(function, inputs, **OPTIONS, **options)
            results[-1] += [*result, grad]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_a_row_is_bitwise_the_same_alone(fused):
    logits, tokens = torch.randn(6, 131), torch.randint(131, (6,))
    temperature = SOME.flatten().to(logits.device)
    together = scored(logits, tokens, temperature, backend=fused)
    for i in range(6):
        row = slice(i, i + 1)
        alone = scored(logits[row], tokens[row], temperature[row], backend=fused)
        assert all(torch.equal(x[i], y[0]) for x, y in zip(together, alone, strict=True))


def test_no_gradient_flows_into_temperatures(backend, function):
    temperature = SOME.to(torch.get_default_device()).requires_grad_()
    inputs = loss_inputs(2, 3, 50)
    logits = inputs["logits"]
    assert not ppo_loss(**inputs, temperature=temperature, backend=backend).loss.requires_grad
    for result in (
        *token_logprobs_and_entropy(
            logits, inputs["tokens"], temperature=temperature, backend=backend
        ),
        kl_divergence(logits, logits.flip(-1), temperature=temperature, backend=backend),
    ):
        assert not result.requires_grad
    run_ppo_loss(function, inputs, temperature=temperature, backend=backend)
    assert temperature.grad is None


@pytest.mark.parametrize("bad", (0.0, -1.0, torch.nan, torch.inf))
def test_a_temperature_that_is_none(backend, function, bad):
    """It is named, or on a GPU gives NaN; where the mask is False it is not looked at."""
    inputs = loss_inputs(2, 3, 256)
    temperature = SOME.to(inputs["logits"].device).clone()
    expected = run_ppo_loss(function, inputs, temperature=temperature, backend=backend)
    out = (~inputs["mask"]).nonzero()[0].tolist()
    temperature[tuple(out)] = bad
    result = run_ppo_loss(function, inputs, temperature=temperature, backend=backend)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    counted = inputs["mask"].nonzero()[1].tolist()
    temperature[tuple(counted)] = bad
    if waits_for_nothing(backend):
        loss, _ = run_ppo_loss(function, inputs, temperature=temperature, backend=backend)
        assert loss.loss.isnan()
        return
    message = rf"temperature must be finite and > 0, got {bad:g}"
    with pytest.raises(ValueError, match=rf"{message}.* at \[{counted[0]}, {counted[1]}\]"):
        function(**inputs, temperature=temperature, backend=backend)
    first = min(out, counted)
    for call in (
        lambda: token_logprobs_and_entropy(
            inputs["logits"], inputs["tokens"], temperature=temperature, backend=backend
        ),
        lambda: kl_divergence(
            inputs["logits"], inputs["logits"], temperature=temperature, backend=backend
        ),
    ):
        with pytest.raises(ValueError, match=rf"{message}.* at \[{first[0]}, {first[1]}\]"):
            call()


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (torch.ones(2), ValueError, r"temperature must have shape \(2, 3\) to match .*got \(2,\)"),
        (torch.ones(2, 1), ValueError, r"temperature must have shape \(2, 3\) .*got \(2, 1\)"),
        (torch.ones(1), ValueError, r"temperature must have shape \(2, 3\) .*got \(1,\)"),
        (torch.ones(2, 3).int(), TypeError, "temperature must be float32.*got torch.int32"),
        (torch.ones(2, 3, device="meta"), ValueError, "temperature must be on .*got meta"),
        ([[1.0] * 3] * 2, TypeError, "temperature must be a Python number, got list"),
    ],
    ids=lambda x: "",
)
def test_bad_tensors_are_named(backend, temperature, error, message):
    inputs = loss_inputs(2, 3, 9)
    options = on_default_device({"temperature": temperature}) | {"backend": backend}
    for call in (
        lambda: token_logprobs_and_entropy(inputs["logits"], inputs["tokens"], **options),
        lambda: kl_divergence(inputs["logits"], inputs["logits"], **options),
        lambda: ppo_loss(**inputs, **options),
        lambda: ppo_loss_(**inputs, **options),
    ):
        with pytest.raises(error, match=message):
            call()


def test_gradcheck(backend):
    skip_if_emulated(backend)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens, temperature = torch.randint(5, (2, 3)), SOME.to(logits.device)
    options = {"temperature": temperature, "backend": backend}
    assert torch.autograd.gradcheck(
        lambda z: sum(token_logprobs_and_entropy(z, tokens, **options)), logits
    )
    other = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: kl_divergence(z, other, **options), logits)


@needs_native
def test_values_that_change_compile_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs = loss_inputs(2, 3, 11)
    inputs |= {name: inputs[name].float() for name in ("old_logprobs", "advantages")}
    logits, tokens = inputs.pop("logits"), inputs.pop("tokens")
    del inputs["ref_logprobs"]

    def every_op(logits, temperature):
        options = {"temperature": temperature}
        scores = token_logprobs_and_entropy(logits, tokens, **options)
        kl = kl_divergence(logits, logits.flip(-1), **options)
        losses = [f(logits * 1, tokens, **inputs, **options).loss for f in (ppo_loss, ppo_loss_)]
        return sum(scores).sum() + kl.sum() + sum(losses)

    compiled = torch.compile(every_op, fullgraph=True, backend=counter)
    for factor in (1.0, 0.9, 2.0):
        results = []
        for call in (compiled, every_op):
            leaf = logits.clone().requires_grad_()
            value = call(leaf, factor * SOME)
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1
