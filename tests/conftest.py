"""Backends, awkward rows of logits and closed-form fp64 truth for the tests of ppo_kernels."""

import importlib.util
import os
from collections import Counter

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run on the CPU, interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ppo_kernels import PPOLoss, dispatch, ppo_loss, ppo_loss_
from tests.compiled import Compilation, table

COMPILATION = pytest.StashKey()
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ON_GPU = "triton on cuda"
TRITON = ("triton", pytest.param(ON_GPU, marks=pytest.mark.gpu))
KERNELS = ("native", *TRITON)


needs_native = pytest.mark.skipif(
    dispatch.why_not("native", "cpu") is not None, reason=str(dispatch.why_not("native", "cpu"))
)


def pytest_collection_finish(session):
    """Kernels compile beside the tests that come before those of compiled kernels."""
    wanted = any("compiled" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly and importlib.util.find_spec("triton"):
        session.config.stash[COMPILATION] = Compilation()


def pytest_unconfigure(config):
    if COMPILATION in config.stash:
        config.stash[COMPILATION].end()


@pytest.fixture(scope="session")
def compiled(request):
    """What `tests.compiled.collect` found in every kernel."""
    if COMPILATION not in request.config.stash:
        pytest.skip("Triton is not installed")
    return request.config.stash[COMPILATION].reports()


def pytest_terminal_summary(terminalreporter, config):
    """How often which backend was tested, why tests were skipped, what kernels compiled to."""
    lines = terminalreporter
    passed = [dict(x.user_properties).get("backend") for x in lines.getreports("passed")]
    reasons = [x.longrepr[2].removeprefix("Skipped: ") for x in lines.getreports("skipped")]
    if reasons:
        lines.section("skipped")
        for reason, count in Counter(reasons).most_common():
            lines.write_line(f"{count:5}  {reason}")
    ran = Counter(name for name in passed if name in ("triton", ON_GPU))
    lines.section("Triton")
    lines.write_line(f"{ran['triton']} tests passed on its interpreter, {ran[ON_GPU]} on a GPU")
    if COMPILATION in config.stash and config.stash[COMPILATION].done():
        reports = config.stash[COMPILATION].reports()
        per_target = Counter(x["target"] for x in reports if "kernel" in x)
        counts = ", ".join(f"{n} for {target}" for target, n in per_target.items())
        lines.write_line(f"{per_target.total()} kernels compiled: {counts}; for sm_90:")
        for line in table(reports):
            lines.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def interpreter_rounds_as_gpus_do():
    """Triton's interpreter cuts fp32 off to bf16; GPUs round to the nearest."""
    if not dispatch.INTERPRETED or dispatch.why_not("triton", "cpu") is not None:
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut = InterpreterBuilder.cast_impl

    def cast(builder, x, to):
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cut(builder, x, to)
        rounded = torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded, tl.bfloat16)

    InterpreterBuilder.cast_impl = cast


def _run_on(request):
    request.node.user_properties.append(("backend", request.param))
    if request.param == ON_GPU:
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        torch.set_default_device("cuda")
        yield "triton"
        torch.set_default_device(None)
        return
    reason = dispatch.why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    yield request.param


@pytest.fixture(params=("reference", *KERNELS))
def backend(request):
    """Every backend that can run on the CPU, and Triton where new tensors lie on a GPU."""
    yield from _run_on(request)


@pytest.fixture(params=KERNELS)
def fused(request):
    """`backend` without the specification."""
    yield from _run_on(request)


def interpreted(backend):
    """Whether kernels run on Triton's interpreter, where a row takes milliseconds."""
    return backend == "triton" and dispatch.INTERPRETED


def skip_if_interpreted(backend):
    if interpreted(backend):
        pytest.skip("too long for the interpreter: runs on a GPU")


def on_default_device(arguments):
    """Arguments drawn before the test chose a device, there; meta tensors stay."""
    return {
        name: x.to(torch.get_default_device())
        if isinstance(x, torch.Tensor) and not x.is_meta
        else x
        for name, x in arguments.items()
    }


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


def thread_counts(backend):
    """How many threads a test of the C++ kernels tries; others have none of their own."""
    return (1, 2, 4) if backend == "native" else (1,)


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
