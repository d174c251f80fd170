"""Backends, awkward rows of logits and closed-form fp64 truth for the tests of ppo_kernels."""

import pytest
import torch

from ppo_kernels import PPOLoss, dispatch, ppo_loss, ppo_loss_

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


needs_native = pytest.mark.skipif(
    dispatch.why_not("native", "cpu") is not None, reason=str(dispatch.why_not("native", "cpu"))
)


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request):
    """Every backend that can run on the CPU."""
    reason = dispatch.why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def seeded_and_nan_filled():
    """Fresh outputs start as NaN, so that an element which is never written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On a busy machine threads wait for each other longer than these shapes take."""
    torch.set_num_threads(1)


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def _with_value(row, position, value):
    row[position] = value
    return row


def awkward_rows(vocabulary):
    """(rows, V) fp64 logits that break careless softmaxes, all representable in fp16."""
    base = torch.randn(vocabulary, dtype=torch.float64).clamp(-4, 4)
    late, half = vocabulary - 1, vocabulary // 2
    rows = {
        "ordinary": 3 * base,
        "all negative": base - 90,
        "all equal": torch.full_like(base, 2.5),
        "one-hot-like": _with_value(base.clone(), half, 500),
        "ascending": (5 * base).sort().values,
        "descending": (5 * base).sort(descending=True).values,
        # 16 bits are 11.1 nats: just below and above that, and far above it.
        "late outlier within 16 bits": _with_value(base.clone(), late, 14.5),
        "late outlier beyond 16 bits": _with_value(base.clone(), late, 18.0),
        "huge late outlier": _with_value(base.clone(), late, 3e4),
        "huge early outlier": _with_value(base.clone(), 0, 3e4),
        "-inf first": torch.where(torch.arange(vocabulary) < late, -torch.inf, base),
        "-inf but one": _with_value(torch.full_like(base, -torch.inf), half, -3.0),
        "-inf every third": torch.where(torch.arange(vocabulary) % 3 == 1, -torch.inf, base),
    }
    first_half = torch.arange(vocabulary) < half
    rows["-inf first half"] = torch.where(first_half, -torch.inf, base)
    rows["low first half"] = torch.where(first_half, -6e4, base)
    rows["-inf last half"] = torch.where(first_half, base, -torch.inf)
    return torch.stack(list(rows.values())).half().double()


def softmax_truth(logits, tokens, temperature):
    """Closed forms in fp64: logprobs, entropy (...), their derivatives in the logits (..., V)."""
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0)
    entropy = -(p * log_p).sum(-1)
    one_hot = torch.nn.functional.one_hot(tokens.long(), logits.shape[-1])
    logprobs = torch.log_softmax(logits.double() / temperature, -1)
    logprobs = logprobs.gather(-1, tokens.long()[..., None])[..., 0]
    grad_logprobs = (one_hot - p) / temperature
    grad_entropy = -p * (log_p + entropy[..., None]) / temperature
    return logprobs, entropy, grad_logprobs, grad_entropy


def assert_as_exact_as_eager(result, eager, truth, scale=1.0, slack=32):
    """The error against fp64 is at most eager's, plus `slack` roundings of the largest number.

    The largest of the truth, or `scale` if that is more. The slack leaves room for sums relative
    to a centre up to 16 bits below the maximum; it is more where truth and eager are fp64 too.
    """
    assert result.shape == truth.shape
    assert result.isfinite().all()
    unit = torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps
    if result.dtype == torch.float64:
        slack *= 4
    allowed = (eager.double() - truth).abs().max() + slack * unit * max(scale, truth.abs().amax())
    error = (result.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, eager's with slack {allowed:.3g}"


def likeliest(logits):
    """A token of finite logit in each row: the likeliest."""
    return logits.argmax(-1)


def loss_inputs(batch, length, vocabulary, dtype=torch.float32):
    """Arguments of `ppo_loss`, in part clipped, one in five masked out."""
    logits = (2 * torch.randn(batch, length, vocabulary)).to(dtype)
    tokens = torch.randint(vocabulary, (batch, length))
    logprobs = torch.log_softmax(logits.double(), -1).gather(-1, tokens[..., None])[..., 0]
    return {
        "logits": logits,
        "tokens": tokens,
        "old_logprobs": logprobs + 0.6 * torch.randn(batch, length, dtype=torch.float64),
        "advantages": torch.randn(batch, length, dtype=torch.float64),
        "mask": torch.arange(batch * length).reshape(batch, length) % 5 != 3,
        "ref_logprobs": logprobs + 0.6 * torch.randn(batch, length, dtype=torch.float64),
    }


def ppo_loss_truth(
    logits,
    tokens,
    old_logprobs,
    advantages,
    mask=None,
    *,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    entropy_coef=0.0,
    kl_coef=0.0,
    ref_logprobs=None,
    kl_estimator="k3",
    temperature=1.0,
    denominator=None,
):
    """PPOLoss and ∂loss/∂logits in fp64: the papers' formulas over the counted tokens.

    The objective of (logprob, entropy) goes through autograd, the softmax through closed forms.
    """
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    scored = softmax_truth(logits[mask], tokens[mask], temperature)
    logprobs, entropy = (x.clone().requires_grad_() for x in scored[:2])
    advantages, old_logprobs = advantages.double()[mask], old_logprobs.double()[mask]
    ratio = torch.exp(logprobs - old_logprobs)
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    acts = clipped < surrogate
    objective = torch.minimum(surrogate, clipped)
    if dual_clip is not None:
        negative = advantages < 0
        objective = torch.where(
            negative, torch.maximum(objective, dual_clip * advantages), objective
        )
    if ref_logprobs is None:
        kl = torch.zeros_like(ratio)
    else:
        delta = logprobs - ref_logprobs.double()[mask]
        kl = {
            "k1": delta,
            "k2": delta**2 / 2,
            "k3": torch.exp(-delta) - 1 + delta,
            "abs": delta.abs(),
        }[kl_estimator]
    count = (mask.sum() if denominator is None else denominator) or 1
    loss = (-objective - entropy_coef * entropy + kl_coef * kl).sum() / count
    grads = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
    g, h = (0.0 if x is None else x[:, None] for x in grads)
    grad_logits = torch.zeros_like(logits, dtype=torch.float64)
    grad_logits[mask] = g * scored[2] + h * scored[3]
    per_token = [torch.zeros(tokens.shape, dtype=torch.float64) for _ in range(2)]
    for x, kept in zip(per_token, scored, strict=False):
        x[mask] = kept
    means = [
        x.sum() / count for x in (-objective, entropy, kl, ratio - 1 - ratio.log(), acts.double())
    ]
    return PPOLoss(*(x.detach() for x in (loss, *means, *per_token))), grad_logits


def run_ppo_loss(function, inputs, **options):
    """Results and gradient of `ppo_loss` or `ppo_loss_` on a copy of the logits."""
    leaf = inputs["logits"].detach().clone().requires_grad_()
    result = function(**(inputs | {"logits": leaf}), **options)
    result.loss.backward()
    return PPOLoss(*(x.detach() for x in result)), leaf.grad


@pytest.fixture(params=(ppo_loss, ppo_loss_), ids=lambda f: f.__name__)
def function(request):
    return request.param
