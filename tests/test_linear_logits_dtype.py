"""linear_* with logits of fp32 from a head in half precision."""

import pytest
import torch

from ppo_kernels import linear_ppo_loss, linear_token_logprobs_and_entropy
from tests.conftest import loss_inputs

HALF = (torch.bfloat16, torch.float16)


def head(dtype, vocabulary=100):
    hidden, weight = 2 * torch.randn(2, 3, 16), torch.randn(vocabulary, 16)
    return [x.to(dtype) for x in (hidden, weight, torch.randn(vocabulary))]


def run(function, arguments, dtype=None):
    leaves = [x.to(dtype or x.dtype).clone().requires_grad_() for x in arguments]
    result = function(*leaves)
    sum(result).backward()
    return [x.detach() for x in result], [x.grad for x in leaves]


def losses(backend, **options):
    """Functions of (hidden, weight, bias) -> results to be added up; always of the same tokens."""
    torch.manual_seed(1)
    inputs = loss_inputs(2, 3, 100)
    inputs = {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
    tokens = inputs["tokens"]
    del inputs["logits"], inputs["tokens"]
    mask, upstream = inputs["mask"], torch.randn(2, 3)

    def logprobs(hidden, weight, bias):
        scored = linear_token_logprobs_and_entropy(
            *(hidden, weight, tokens, mask), bias=bias, backend=backend, **options
        )
        return [(upstream * x).sum() for x in scored]

    def loss(hidden, weight, bias):
        coefs = {"entropy_coef": 0.1, "kl_coef": 0.1}
        rest = {**inputs, **coefs, "bias": bias, "backend": backend, **options}
        return [linear_ppo_loss(hidden, weight, tokens, **rest).loss]

    return logprobs, loss


@pytest.mark.parametrize("softcap", (None, 20.0))
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_logits_and_their_gradient_keep_fp32(backend, dtype, softcap):
    """As of the same numbers in fp32, where results of half precision are off by 100 times more."""
    arguments = head(dtype)
    options = {"softcap": softcap, "chunk_bytes": 1000, "grad_weight_dtype": torch.float32}
    kept = losses(backend, logits_dtype=torch.float32, **options)
    for i, function in enumerate(kept):
        results, grads = run(function, arguments)
        expected, expected_grads = run(
            losses("reference", softcap=softcap)[i], arguments, torch.float32
        )
        rounded, _ = run(losses(backend, **options)[i], arguments)
        for x, y, coarse in zip(results, expected, rounded, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
            assert (coarse - y).abs() > 10 * (x - y).abs()
        for x, y in zip(grads, expected_grads, strict=True):
            assert x.dtype == dtype
            torch.testing.assert_close(x, y.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_autocast_lowers_the_head_and_not_the_logits(backend):
    """The head is rounded to autocast's dtype, its products are not."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("of the CPU's autocast")
    arguments = head(torch.float32)
    function = losses(backend, logits_dtype=torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, _ = run(function, arguments)
    lowered = [x.bfloat16().float() for x in arguments]
    expected, _ = run(losses("reference")[0], lowered)
    torch.testing.assert_close(results, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_the_heads_own_dtype_changes_nothing(backend, dtype):
    arguments = head(dtype)
    own, none = losses(backend, logits_dtype=dtype)[1], losses(backend)[1]
    for x, y in zip(run(own, arguments), run(none, arguments), strict=True):
        assert all(a.equal(b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.half)],
    ids=str,
)
def test_another_dtype_is_named(dtype, bad):
    for function in losses("auto", logits_dtype=bad):
        with pytest.raises(ValueError, match=f"logits_dtype must be None, {dtype} or.*got {bad}"):
            function(*head(dtype))
