"""From hidden states: values and gradients against fp64 truth, whatever the chunk; errors."""

import contextlib
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_kernels import (
    PPOLoss,
    check_logprobs,
    linear_ppo_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    ppo_loss,
)
from tests.conftest import (
    assert_as_exact_as_eager,
    loss_inputs,
    needs_native,
    on_default_device,
    ppo_loss_truth,
    skip_if_emulated,
    softmax_truth,
    waits_for_nothing,
)

V, D = 67, 6
# Bytes: chunks of five tokens in fp64, of all.
CHUNKS = (5 * 8 * V, None)
HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "both": {"logit_scale": 0.25, "softcap": 3.0},
}
OPTIONS = {
    "clip_low": 0.1,
    "dual_clip": 1.3,
    "entropy_coef": 0.1,
    "kl_coef": 0.2,
    "temperature": 0.7,
    "denominator": 9.5,
}


def inputs_of(dtype=torch.float64, biased=True, head=HEADS["plain"]):
    """(hidden, weight and bias; the rest of a loss's arguments), with one token excluded."""
    head_of = {"hidden": torch.randn(3, 6, D)[:, :-1], "weight": torch.randn(V, D) / 2}
    if biased:
        head_of["bias"] = torch.randn(V)
        if "softcap" not in head:
            head_of["bias"][7] = -math.inf
    head_of = {name: x.to(dtype) for name, x in head_of.items()}
    rest = loss_inputs(3, 5, V)
    rest["tokens"].clamp_(min=8)
    logits, _ = logits_truth(head_of, head)
    logprobs = softmax_truth(logits, rest["tokens"], 1.0)[0]
    noise = torch.randn(2, 3, 5, dtype=torch.float64)
    real = torch.promote_types(dtype, torch.float32)
    rest["old_logprobs"], rest["ref_logprobs"] = (logprobs + 0.4 * noise).to(real)
    del rest["logits"]
    return head_of, rest


def logits_truth(head_of, head):
    """z in fp64 and its derivative in W h + b."""
    hidden, weight = head_of["hidden"].double(), head_of["weight"].double()
    logits = hidden @ weight.T + head_of.get("bias", torch.zeros(())).double()
    scale, cap = head.get("logit_scale", 1.0), head.get("softcap")
    if cap is None:
        return scale * logits, torch.full_like(logits, scale)
    return cap * torch.tanh(scale * logits / cap), scale / torch.cosh(scale * logits / cap) ** 2


def gradients_truth(head_of, head, grad_logits):
    grad = grad_logits * logits_truth(head_of, head)[1]
    hidden, weight = head_of["hidden"].double(), head_of["weight"].double()
    grads = {"hidden": grad @ weight, "weight": torch.einsum("btv,btd->vd", grad, hidden)}
    return grads | ({"bias": grad.sum((0, 1))} if "bias" in head_of else {})


def leaves_of(head_of, frozen=()):
    return {
        name: x.detach().clone().requires_grad_(name not in frozen) for name, x in head_of.items()
    }


def run_loss(head_of, rest, upstream=1.0, frozen=(), **options):
    """Results and gradients by name."""
    leaves = leaves_of(head_of, frozen)
    result = linear_ppo_loss(**leaves, **rest, **options)
    (upstream * result.loss).backward()
    grads = {name: x.grad for name, x in leaves.items()}
    return PPOLoss(*(x.detach() for x in result)), grads


def close(ours, truth, atol=1e-12):
    torch.testing.assert_close(ours, truth, atol=atol, rtol=1e-11)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_matches_the_formulas(backend, head, chunk_bytes):
    if head in ("scale", "softcap"):
        skip_if_emulated(backend)
    head = HEADS[head]
    head_of, rest = inputs_of(biased=chunk_bytes is None, head=head)
    truth, grad_logits = ppo_loss_truth(logits_truth(head_of, head)[0], **rest, **OPTIONS)
    expected = gradients_truth(head_of, head, grad_logits)
    options = head | OPTIONS | {"chunk_bytes": chunk_bytes, "backend": backend}
    result, grads = run_loss(head_of, rest, upstream=2.5, **options)
    for ours, true in zip(result, truth, strict=True):
        close(ours, true)
    for name, true in expected.items():
        close(grads[name], 2.5 * true)
    assert (grads["hidden"][~rest["mask"]] == 0).all()


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_logprobs_and_entropy_match_the_formulas(backend, head, chunk_bytes):
    if head in ("scale", "softcap"):
        skip_if_emulated(backend)
    head = HEADS[head]
    head_of, rest = inputs_of(biased=chunk_bytes is None, head=head)
    logits = logits_truth(head_of, head)[0]
    *truth, grad_logprobs, grad_entropy = softmax_truth(logits, rest["tokens"], 0.7)
    # Some rows have no upstream gradient, some one of the two.
    g, h = torch.randn(2, 3, 5, dtype=torch.float64)
    g, h = g * rest["mask"], h * rest["mask"] * (h > 0)
    grad_logits = g[..., None] * grad_logprobs + h[..., None] * grad_entropy
    leaves = leaves_of(head_of)
    options = head | {"temperature": 0.7, "chunk_bytes": chunk_bytes, "backend": backend}
    result = linear_token_logprobs_and_entropy(**leaves, tokens=rest["tokens"], **options)
    close(tuple(result), tuple(truth))
    torch.autograd.backward(result, (g, h))
    for name, true in gradients_truth(head_of, head, grad_logits).items():
        close(leaves[name].grad, true)
    logprobs = linear_token_logprobs(**leaves, tokens=rest["tokens"].int(), **options)
    assert torch.equal(logprobs, result.logprobs)
    for x in leaves.values():
        x.grad = None
    logprobs.backward(g)
    true = gradients_truth(head_of, head, g[..., None] * grad_logprobs)
    close(leaves["weight"].grad, true["weight"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("head", ("plain", "both"))
def test_as_exact_as_eager(backend, head, dtype):
    """`reference` is eager here."""
    head = HEADS[head]
    head_of, rest = inputs_of(dtype, head=head)
    options = head | OPTIONS | {"denominator": 1}
    truth, grad_logits = ppo_loss_truth(
        logits_truth(head_of, head)[0], **rest, **OPTIONS | {"denominator": 1}
    )
    expected = gradients_truth(head_of, head, grad_logits)
    eager, eager_grads = run_loss(head_of, rest, backend="reference", **options)
    chunks = {"chunk_bytes": 4 * V * head_of["hidden"].element_size()}
    result, grads = run_loss(head_of, rest, backend=backend, **options, **chunks)
    # Two products round differently; in half precision the logits are rounded then.
    slack = (
        32
        if dtype == torch.float32
        else 4 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    )
    for ours, theirs, true in zip(result, eager, truth, strict=True):
        assert_as_exact_as_eager(ours, theirs, true, scale=15, slack=slack)
    for name, true in expected.items():
        assert grads[name].dtype == dtype
        assert_as_exact_as_eager(grads[name], eager_grads[name], true, slack=slack)


@pytest.mark.parametrize("bad", (-1.0, math.nan))
def test_a_bad_temperature_is_named_by_its_place(backend, bad):
    if waits_for_nothing(backend):
        pytest.skip("where nothing waits nothing raises")
    head = HEADS["both"] | {"chunk_bytes": 1, "backend": backend}
    head_of, rest = inputs_of(head=HEADS["both"])
    rest["mask"] = torch.ones(3, 5, dtype=torch.bool)
    temperature = torch.ones(3, 5)
    temperature[2, 3] = bad
    arguments = leaves_of(head_of) | head | {"temperature": temperature}
    message = rf"temperature must be finite and > 0, got {bad}.* at \[2, 3\]"
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(tokens=rest["tokens"], **arguments)
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(**rest, **arguments)
    rest["mask"][2, 3] = False
    assert linear_ppo_loss(**rest, **arguments).loss.isfinite()


def test_half_precision_temperatures_are_not_rounded_again(backend):
    """With a soft cap or a scale the kernels take other temperatures than the caller's."""
    head_of, rest = inputs_of(torch.float32, head=HEADS["both"])
    temperature = (0.5 + torch.rand(3, 5)).bfloat16()
    results = [
        linear_token_logprobs(
            **leaves_of(head_of),
            **HEADS["both"],
            tokens=rest["tokens"],
            temperature=x,
            backend=backend,
        )
        for x in (temperature, temperature.double())
    ]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_a_temperature_for_each_token(backend):
    head = HEADS["both"]
    head_of, rest = inputs_of(head=head)
    logits, temperature = logits_truth(head_of, head)[0], 0.5 + torch.rand(3, 5).double()
    heated = logits / temperature[..., None]
    truth, grad_logits = ppo_loss_truth(heated, **rest, entropy_coef=0.1)
    expected = gradients_truth(head_of, head, grad_logits / temperature[..., None])
    options = head | {"temperature": temperature, "chunk_bytes": 3 * 8 * V, "backend": backend}
    result, grads = run_loss(head_of, rest, entropy_coef=0.1, **options)
    close(tuple(result), tuple(truth))
    leaves = leaves_of(head_of)
    logprobs = linear_token_logprobs(**leaves, tokens=rest["tokens"], **options)
    close(logprobs, softmax_truth(heated, rest["tokens"], 1.0)[0])
    logprobs.sum().backward()
    grad_logprobs = softmax_truth(heated, rest["tokens"], 1.0)[2] / temperature[..., None]
    for name, true in gradients_truth(head_of, head, grad_logprobs).items():
        close(grads[name], expected[name])
        close(leaves[name].grad, true)


@pytest.mark.parametrize("of", ("loss", "logprobs"))
def test_many_chunks_of_a_bf16_gradient_add_up_in_fp32(backend, of):
    """512 tokens that each add 1/512 of a sum: in bf16 the last ones are rounded away."""
    skip_if_emulated(backend)
    n = 512
    hidden = torch.ones(n, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    tokens, ones = torch.zeros(n, dtype=torch.int64), torch.ones(n)
    arguments = hidden, weight, tokens, ones * math.log(0.5), ones
    grads = {}
    for dtype in (None, torch.float32):
        options = {"grad_weight_dtype": dtype, "chunk_bytes": 1, "backend": backend}
        if of == "loss":
            loss = linear_ppo_loss(*arguments, **options).loss
        else:
            loss = -linear_token_logprobs(*arguments[:3], **options).mean()
        (grads[dtype],) = torch.autograd.grad(loss, weight)
    truth = torch.tensor([[-0.5], [0.5]], dtype=torch.bfloat16)
    assert torch.equal(grads[torch.float32], truth)
    assert backend == "reference" or not torch.equal(grads[None], truth)


@pytest.mark.parametrize("garbage", (math.nan, math.inf))
def test_masked_out_tokens_are_not_read(backend, garbage):
    head_of, rest = inputs_of(torch.float32)
    options = OPTIONS | HEADS["both"] | {"chunk_bytes": 4 * 4 * V, "backend": backend}
    clean = run_loss(head_of, rest, **options)
    out = ~rest["mask"]
    head_of["hidden"] = head_of["hidden"].clone()
    for x in (head_of["hidden"], *(rest[name] for name in ("old_logprobs", "ref_logprobs"))):
        x[out] = garbage
    rest["tokens"] = rest["tokens"].masked_fill(out, -100)
    dirty = run_loss(head_of, rest, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean[0], dirty[0], strict=True))
    for name in ("weight", "bias"):
        assert torch.equal(clean[1][name], dirty[1][name])
    assert (dirty[1]["hidden"][out] == 0).all()


@pytest.mark.parametrize("frozen", (("weight", "bias"), ("hidden",), ("hidden", "weight")))
def test_frozen_inputs_get_no_gradient_and_change_no_other(backend, frozen):
    head_of, rest = inputs_of(head=HEADS["both"])
    options = OPTIONS | HEADS["both"] | {"backend": backend}
    whole, grads = run_loss(head_of, rest, **options)
    part, some = run_loss(head_of, rest, frozen=frozen, **options)
    close(tuple(part), tuple(whole))
    for name, grad in some.items():
        if name in frozen:
            assert grad is None
        else:
            close(grad, grads[name])


def test_products_that_nobody_wants_are_not_made(fused):
    """Nor without autograd, nor, on a CPU, those of masked-out tokens."""
    head_of, rest = inputs_of(biased=False)
    n = rest["mask"].numel() if waits_for_nothing(fused) else rest["mask"].sum().item()
    for frozen, products in (((), 3), (("weight",), 2), (("hidden",), 2), (head_of, 1), ((), 1)):
        leaves = leaves_of(head_of, frozen)
        profiler = torch.profiler.profile(record_shapes=True)
        with torch.set_grad_enabled(products > 1), profiler as profile:
            linear_ppo_loss(**leaves, **rest, chunk_bytes=4 * 8 * V, backend=fused)
        multiplied = 0
        for event in profile.events():
            if event.name in ("aten::mm", "aten::addmm_"):
                shapes = event.input_shapes[event.name == "aten::addmm_" :]
                (rows, inner), (_, columns) = shapes[:2]
                multiplied += rows * inner * columns
        assert multiplied == products * n * D * V


@needs_native
@pytest.mark.parametrize("dtype", (None, torch.float32))
def test_vocabulary_of_several_blocks(dtype):
    """A head is multiplied in pieces of 2,048 rows."""
    head_of = {"hidden": torch.randn(1, 3, D), "weight": torch.randn(4099, D)}
    head_of = {name: x.bfloat16() for name, x in head_of.items()}
    rest = loss_inputs(1, 3, 4099)
    del rest["logits"]
    options = {"denominator": 1, "backend": "native", "grad_weight_dtype": dtype}
    eager, eager_grads = run_loss(head_of, rest, denominator=1, backend="reference")
    result, grads = run_loss(head_of, rest, **options)
    torch.testing.assert_close(tuple(result), tuple(eager), atol=1e-3, rtol=1e-2, check_dtype=False)
    torch.testing.assert_close(grads, eager_grads, atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("shape", ((), (1,), (2, 0), (0,)))
def test_token_counts(backend, shape):
    head_of = {"hidden": torch.randn(*shape, D), "weight": torch.randn(V, D)}
    head_of = {name: x.double() for name, x in head_of.items()}
    rest = {
        "tokens": torch.randint(V, shape),
        "old_logprobs": torch.randn(shape) - 8,
        "advantages": torch.randn(shape),
    }
    truth, grad_logits = ppo_loss_truth(logits_truth(head_of, {})[0], **rest)
    result, grads = run_loss(head_of, rest, backend=backend)
    close(tuple(result), tuple(truth))
    hidden, grad = head_of["hidden"].reshape(-1, D), grad_logits.reshape(-1, V)
    close(grads["weight"], grad.T @ hidden)
    close(grads["hidden"], grad_logits @ head_of["weight"])
    logprobs = linear_token_logprobs(**head_of, tokens=rest["tokens"], backend=backend)
    close(logprobs, truth.logprobs)


def test_without_a_counted_token_everything_is_zero(backend):
    head_of, rest = inputs_of()
    rest["mask"] = torch.zeros_like(rest["mask"])
    result, grads = run_loss(head_of, rest, backend=backend)
    assert all((x == 0).all() for x in (*result, *grads.values()))


def test_tied_head_of_a_model(backend):
    """The embedding is the head: its gradient comes from both ends."""
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).double()
    rest = loss_inputs(2, 6, 97)
    ids = rest["tokens"]
    del rest["logits"]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters()}

    whole = ppo_loss(model(ids).logits, **rest, backend="reference")
    expected = gradients(whole.loss)
    hidden = model.model(ids).last_hidden_state
    options = {"chunk_bytes": 8 * 97 * 5, "backend": backend}
    result = linear_ppo_loss(hidden, model.lm_head.weight, **rest, **options)
    close(result.loss, whole.loss)
    for name, grad in gradients(result.loss).items():
        close(grad, expected[name])


def test_autocast_casts_as_a_linear_layer_does(backend):
    head_of, rest = inputs_of(torch.float32)
    device = head_of["hidden"].device.type
    cast = {name: x.bfloat16() for name, x in head_of.items()}
    expected, expected_grads = run_loss(cast, rest, **OPTIONS, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        result, grads = run_loss(head_of, rest, **OPTIONS, backend=backend)
        logprobs = linear_token_logprobs(**head_of, tokens=rest["tokens"], backend=backend)
    close(tuple(result), tuple(expected))
    for name, x in grads.items():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, expected_grads[name].float(), rtol=1e-2, atol=1e-5)
    close(logprobs, linear_token_logprobs(**cast, tokens=rest["tokens"], backend=backend))


def test_transposed_inputs_are_left_alone_and_their_gradients_scaled(backend):
    head_of, rest = inputs_of(torch.float32, biased=False)
    expected = run_loss(head_of, rest, upstream=2.5, backend=backend)
    strided = {name: x.mT.contiguous().mT for name, x in head_of.items()}
    before = {name: x.clone() for name, x in (strided | rest).items()}
    result = run_loss(strided, rest, upstream=2.5, backend=backend)
    torch.testing.assert_close(result, expected)
    assert all(torch.equal(x, before[name]) for name, x in (strided | rest).items())


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_autograd(backend, mode):
    head_of, rest = inputs_of(torch.float32)
    expected, _ = run_loss(head_of, rest, backend=backend)
    with mode():
        result = linear_ppo_loss(**leaves_of(head_of), **rest, backend=backend)
        leaves = leaves_of(head_of)
        logprobs = linear_token_logprobs(**leaves, tokens=rest["tokens"], backend=backend)
    assert not result.loss.requires_grad and not logprobs.requires_grad
    torch.testing.assert_close(tuple(result), tuple(expected))


def test_second_backward_raises(fused):
    head_of, rest = inputs_of(torch.float32)
    result = linear_ppo_loss(**leaves_of(head_of), **rest, backend=fused)
    assert not any(x.requires_grad for x in result[1:])
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_ppo_loss can be differentiated once"):
        result.loss.backward()


def test_second_derivative_is_refused(fused):
    head_of, rest = inputs_of(torch.float32)
    leaves = leaves_of(head_of)
    loss = linear_ppo_loss(**leaves, **rest, backend=fused).loss
    logprobs = linear_token_logprobs(**leaves, tokens=rest["tokens"], backend=fused)
    for value in (loss, logprobs.sum()):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(value, leaves["weight"], create_graph=True)


def refused(head_of, rest, backend, message):
    """As in tests/test_ppo_loss.py."""
    options = {"chunk_bytes": 2 * 4 * V, "backend": backend}
    raises = pytest.raises(ValueError, match=message)
    if waits_for_nothing(backend):
        result, _ = run_loss(head_of, rest, **options)
        assert result.loss.isnan()
        with raises:
            check_logprobs(result.logprobs, rest["tokens"], rest["mask"])
        return
    with raises:
        run_loss(head_of, rest, **options)


def test_impossible_token_is_named_by_its_place(backend):
    head_of, rest = inputs_of(torch.float32)
    rest["tokens"][2, 1] = 7
    refused(head_of, rest, backend, r"-inf for token 7 at \[2, 1\]")


@pytest.mark.parametrize("bad", (-1, V))
def test_ids_out_of_range_are_named_by_their_place(backend, bad):
    head_of, rest = inputs_of(torch.float32)
    rest["tokens"][2, 1] = bad
    message = rf"tokens must be in \[0, {V}\), got {bad} at \[2, 1\]"
    if waits_for_nothing(backend):
        message = rf"got nan for token {bad} at \[2, 1\]"
    refused(head_of, rest, backend, message)
    logprobs = contextlib.nullcontext()
    if not waits_for_nothing(backend):
        logprobs = pytest.raises(ValueError, match=message)
    with logprobs:
        got = linear_token_logprobs(**head_of, tokens=rest["tokens"], backend=backend)
        assert got[2, 1].isnan() and got[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.ones(2, 3, 4).int()}, TypeError, "hidden must be float32.*int32"),
        ({"hidden": torch.ones(())}, ValueError, r"hidden must have shape \(..., D\).*\(\)"),
        ({"hidden": torch.ones(2, 3, 0)}, ValueError, r"hidden must have shape .*\(2, 3, 0\)"),
        ({"hidden": torch.ones(2, 3, 5)}, ValueError, r"weight must have shape \(9, 5\).*\(9, 4\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(V, D\).*\(4,\)"),
        ({"weight": torch.ones(0, 4)}, ValueError, r"weight must have .* V >= 1.*\(0, 4\)"),
        ({"weight": torch.ones(9, 4).double()}, TypeError, "weight must be .*float32.*float64"),
        ({"weight": torch.ones(9, 4, device="meta")}, ValueError, "weight must be on .*got meta"),
        ({"bias": torch.ones(8)}, ValueError, r"bias must have shape \(9,\).*\(8,\)"),
        ({"bias": torch.ones(9).bfloat16()}, TypeError, "bias must be .*float32.*bfloat16"),
        ({"tokens": torch.ones(2, 4).int()}, ValueError, r"tokens must have shape \(2, 3\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        ({"softcap": 0.0}, ValueError, "softcap must be > 0, got 0.0"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale must be > 0, got -1.0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be > 0, got 0"),
        ({"advantages": torch.ones(2, 1)}, ValueError, r"advantages must have shape \(2, 3\)"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs must be given when kl_coef > 0"),
        ({"grad_weight_dtype": torch.float16}, ValueError, "grad_weight_dtype must be None"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(backend, arguments, error, message):
    given = {
        "hidden": torch.ones(2, 3, 4),
        "weight": torch.ones(9, 4),
        "tokens": torch.ones(2, 3).long(),
        "old_logprobs": torch.zeros(2, 3),
        "advantages": torch.zeros(2, 3),
    } | on_default_device(arguments)
    with pytest.raises(error, match=message):
        linear_ppo_loss(**given, backend=backend)
    of_logprobs = {"old_logprobs", "advantages", "kl_coef"}
    if not of_logprobs & arguments.keys():
        given = {name: x for name, x in given.items() if name not in of_logprobs}
        with pytest.raises(error, match=message):
            linear_token_logprobs(**given, backend=backend)


def test_lengths_that_change_compile_once(fused):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight = torch.randn(11, 5)

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(hidden, tokens, old_logprobs, advantages):
        return linear_ppo_loss(hidden, weight, tokens, old_logprobs, advantages, backend=fused)

    for n in (3, 5, 8, 13):
        inputs = torch.randn(n, 5), torch.randint(11, (n,)), torch.randn(n), torch.randn(n)
        expected = linear_ppo_loss(inputs[0], weight, *inputs[1:], backend=fused)
        torch.testing.assert_close(compiled(*inputs), expected)
    assert counter.frame_count <= 2


def test_gradcheck(backend):
    skip_if_emulated(backend)
    hidden, weight = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    bias, tokens = torch.randn(5).double(), torch.randint(5, (4,))
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))

    def scored(hidden, weight, bias):
        options = {"softcap": 2.0, "logit_scale": 0.5, "chunk_bytes": 80, "backend": backend}
        return tuple(
            linear_token_logprobs_and_entropy(hidden, weight, tokens, bias=bias, **options)
        )

    assert torch.autograd.gradcheck(scored, inputs)
