"""Backends, awkward rows of logits and closed-form fp64 truth for the tests of ppo_kernels."""

import importlib.util
import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist

# Before anything imports Triton: without a GPU its kernels run on the CPU, interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ppo_kernels import PPOLoss, dispatch, ppo_loss, ppo_loss_, schemas
from tests import emulator, interpreter
from tests.compiled import MEASURED, Compilation, cuda, table
from tests.parts import pytest_addoption, pytest_collection_modifyitems  # noqa: F401

COMPILATION, CUDA_COMPILATION = pytest.StashKey(), pytest.StashKey()
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The kernels of `native` for GPUs, run on the CPU by `tests.emulator`.
EMULATED = "native cuda emulated"
ON_GPU = ("native on cuda", "triton on cuda")
CUDA = (EMULATED, pytest.param(ON_GPU[0], marks=pytest.mark.gpu))
TRITON = ("triton", pytest.param(ON_GPU[1], marks=pytest.mark.gpu))
KERNELS = ("native", *CUDA, *TRITON)


needs_native = pytest.mark.skipif(
    dispatch.why_not("native", "cpu") is not None, reason=str(dispatch.why_not("native", "cpu"))
)


def pytest_collection_finish(session):
    """Kernels compile beside the tests that come before those of compiled kernels."""
    if session.config.option.collectonly:
        return

    def targets(fixture, measured):
        """Those that the tests with this fixture name, or the one that is measured."""
        wanted = [x for x in session.items if fixture in getattr(x, "fixturenames", ())]
        named = [getattr(x, "callspec", None) for x in wanted]
        return {x.params.get("target", measured) if x else measured for x in named}

    wanted = targets("compiled", MEASURED)
    if wanted and importlib.util.find_spec("triton"):
        session.config.stash[COMPILATION] = Compilation(wanted)
    wanted = targets("cuda_compiled", cuda.MEASURED)
    if wanted and cuda.why_not() is None:
        session.config.stash[CUDA_COMPILATION] = cuda.Compilation(wanted)


def pytest_unconfigure(config):
    for key in (COMPILATION, CUDA_COMPILATION):
        if key in config.stash:
            config.stash[key].end()


@pytest.fixture(scope="session")
def compiled(request):
    """What `tests.compiled.collect` found in every kernel."""
    if COMPILATION not in request.config.stash:
        pytest.skip("Triton is not installed")
    return request.config.stash[COMPILATION].reports()


@pytest.fixture(scope="session")
def cuda_compiled(request):
    """What `tests.compiled.cuda` found in every kernel."""
    if CUDA_COMPILATION not in request.config.stash:
        pytest.skip(cuda.why_not())
    return request.config.stash[CUDA_COMPILATION].reports()


def pytest_terminal_summary(terminalreporter, config):
    """How often which backend was tested, why tests were skipped, what kernels compiled to."""
    lines = terminalreporter
    passed = [dict(x.user_properties).get("backend") for x in lines.getreports("passed")]
    reasons = [x.longrepr[2].removeprefix("Skipped: ") for x in lines.getreports("skipped")]
    if reasons:
        lines.section("skipped")
        for reason, count in Counter(reasons).most_common():
            lines.write_line(f"{count:5}  {reason}")
    ran = Counter(passed)
    lines.section("CUDA C++")
    lines.write_line(f"{ran[EMULATED]} tests passed on the emulator, {ran[ON_GPU[0]]} on a GPU")
    if CUDA_COMPILATION in config.stash and config.stash[CUDA_COMPILATION].done():
        for line in cuda.summary(config.stash[CUDA_COMPILATION].reports()):
            lines.write_line(line)
    lines.section("Triton")
    lines.write_line(f"{ran['triton']} tests passed on its interpreter, {ran[ON_GPU[1]]} on a GPU")
    if COMPILATION in config.stash and config.stash[COMPILATION].done():
        reports = config.stash[COMPILATION].reports()
        per_target = Counter(x["target"] for x in reports if "kernel" in x)
        counts = ", ".join(f"{n} for {target}" for target, n in per_target.items())
        lines.write_line(f"{per_target.total()} kernels compiled: {counts}; for sm_90:")
        for line in table(reports):
            lines.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def interpreted():
    """Triton's interpreter, where it runs, rounds as GPUs do and is quick."""
    interpreter.prepare()


@pytest.fixture
def emulated(request, monkeypatch):
    """`tests.emulator`, and backend "native" is what it runs. Its device has so little shared
    memory that rows of a few hundred elements are split over clusters."""
    try:
        device = emulator.load()
    except emulator.Unavailable as reason:
        pytest.skip(f"{EMULATED}: {reason}")
    monkeypatch.setitem(schemas.NAMESPACE, "native", schemas.NAMESPACE["emulated"])
    monkeypatch.setitem(dispatch._MISSING, "native", None)
    request.node.user_properties.append(("backend", EMULATED))
    device.device(shared_per_sm=12 << 10)
    device.seed(0)
    return device


def _run_on(request):
    request.node.user_properties.append(("backend", request.param))
    name = request.param.split()[0]
    if request.param in ON_GPU:
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        reason = dispatch.why_not(name, "cuda")
    elif request.param == EMULATED:
        request.getfixturevalue("emulated")
        reason = None
    else:
        reason = dispatch.why_not(name, "cpu")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    if request.param in ON_GPU:
        torch.set_default_device("cuda")
    yield name
    torch.set_default_device(None)


@pytest.fixture(params=("reference", *KERNELS))
def backend(request):
    """Every backend, on the CPU and, where new tensors lie there, on a GPU."""
    yield from _run_on(request)


@pytest.fixture(params=KERNELS)
def fused(request):
    """`backend` without the specification."""
    yield from _run_on(request)


def emulates_a_gpu(backend):
    """Whether a row takes milliseconds: on Triton's interpreter and on `tests.emulator`."""
    emulated = schemas.NAMESPACE["native"] == schemas.NAMESPACE.get("emulated")
    return (backend == "triton" and dispatch.INTERPRETED) or (backend == "native" and emulated)


def waits_for_nothing(backend):
    """Whether kernels run as on a GPU, where nothing raises for what a tensor holds."""
    on_gpu = backend in KERNELS and torch.get_default_device().type == "cuda"
    return on_gpu or emulates_a_gpu(backend)


def skip_if_emulated(backend):
    if emulates_a_gpu(backend):
        pytest.skip("too long without a GPU")


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
def group_of_one(tmp_path):
    """The process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rank", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def thread_counts(backend):
    """How many threads a test of the C++ kernels tries; others have none of their own."""
    return (1, 2, 4) if backend == "native" and not waits_for_nothing(backend) else (1,)


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


def log_softmax_truth(logits, temperature=1.0):
    """Sums in fp64 that cascade: torch.log_softmax adds a row up in four chains on AVX2."""
    x = logits.double() / temperature
    x = x - x.amax(-1, keepdim=True)
    return x - x.exp().sum(-1, keepdim=True).log()


def softmax_truth(logits, tokens, temperature):
    """Closed forms in fp64: logprobs, entropy (...), their derivatives in the logits (..., V)."""
    log_p = log_softmax_truth(logits, temperature)
    logprobs = log_p.gather(-1, tokens.long()[..., None])[..., 0]
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0)
    entropy = -(p * log_p).sum(-1)
    one_hot = torch.nn.functional.one_hot(tokens.long(), logits.shape[-1])
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
    drawn = {
        "logits": logits,
        "tokens": tokens,
        "old_logprobs": logprobs + 0.6 * torch.randn(batch, length, dtype=torch.float64),
        "advantages": torch.randn(batch, length, dtype=torch.float64),
        "mask": torch.arange(batch * length).reshape(batch, length) % 5 != 3,
        "ref_logprobs": logprobs + 0.6 * torch.randn(batch, length, dtype=torch.float64),
    }
    # fp64 beside fp32 would give fp64 results.
    real = schemas.result_dtype(logits)
    return {k: x.to(real) if x.dtype == torch.float64 else x for k, x in drawn.items()}


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
