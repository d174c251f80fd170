"""What only a GPU can show of the ops: graphs, waiting, large tensors, which device runs.

Values and gradients are tested with every other backend's, by the tests that take a `backend`.
Without a GPU these tests are rehearsed on the CPU, smaller, in Triton's interpreter and by
`tests.emulator`: every line has then run, and nothing is proven.
"""

import contextlib

import pytest
import torch

import ppo_kernels
from ppo_kernels import dispatch, kl_divergence, ppo_loss_, token_logprobs_and_entropy
from tests.conftest import assert_as_exact_as_eager, loss_inputs, ppo_loss_truth, softmax_truth
from tests.test_registered_ops import FUNCTIONS, _public

pytestmark = pytest.mark.gpu

ON_GPU = torch.cuda.is_available()
DEVICES = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if ON_GPU else ["cpu"]
# More than a grid's y and z take, and more elements than int32 counts.
MANY_ROWS = 65_537 if ON_GPU else 5
LARGE = (16_400, 131_072) if ON_GPU else (3, 128)


@pytest.fixture(params=("native", "triton"), autouse=True)
def backend(request):
    """A backend of kernels for GPUs, and new tensors lie where it runs."""
    if request.param == "native" and not ON_GPU:
        request.getfixturevalue("emulated")
    reason = dispatch.why_not(request.param, torch.device(DEVICES[0]).type)
    if reason is not None:
        pytest.skip(reason)
    torch.set_default_device(DEVICES[0])
    yield request.param
    torch.set_default_device(None)


def captured(step):
    """`step` in a CUDA graph: its results, and a function that computes them again in place."""
    if not ON_GPU:
        results = step()
        return results, lambda: [x.copy_(y) for x, y in zip(results, step(), strict=True)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return results, graph.replay


@contextlib.contextmanager
def no_waiting():
    """Where the host would wait for the GPU, PyTorch raises."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def value_and_gradient(function, leaf):
    value = function(leaf, 0.9)
    gradient = torch.autograd.grad(value.sum(), leaf) if value.requires_grad else ()
    return value.detach(), *gradient


@pytest.mark.parametrize("name", FUNCTIONS)
def test_runs_in_a_graph_on_new_values(backend, name):
    function, x = _public(backend)[name]
    leaf = x.clone().requires_grad_()
    results, replay = captured(lambda: value_and_gradient(function, leaf))
    with torch.no_grad():
        leaf.copy_(x.flip(0))
    replay()
    expected = value_and_gradient(function, x.flip(0).requires_grad_())
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_waits_for_nothing(backend, name):
    function, x = _public(backend)[name]
    leaf = x.clone().requires_grad_()
    expected = value_and_gradient(function, leaf)
    with no_waiting():
        results = value_and_gradient(function, leaf)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_a_denominator_on_the_cpu_is_not_waited_for(backend):
    inputs = loss_inputs(2, 3, 11)
    denominator = torch.tensor(5.0, device="cpu")
    with no_waiting():
        result = ppo_kernels.ppo_loss(**inputs, denominator=denominator, backend=backend)
    expected = ppo_kernels.ppo_loss(**inputs, denominator=5.0, backend=backend)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_graphs_of_the_compiler_take_new_numbers(backend):
    """CUDA graphs are replayed with the numbers that they were recorded with."""
    torch._dynamo.reset()
    logits, tokens = torch.randn(3, 11), torch.tensor([1, 5, 9])

    def step(temperature):
        return token_logprobs_and_entropy(logits, tokens, temperature=temperature, backend=backend)

    compiled = torch.compile(step, mode="reduce-overhead")
    for temperature in (1.0, 0.7, 0.9, 0.9, 0.9, 0.8):
        results = [x.clone() for x in compiled(temperature)]
        torch.testing.assert_close(results, list(step(temperature)))


def test_the_default_compiler_takes_all_ops_in_one_graph(backend):
    torch._dynamo.reset()
    public = _public(backend)

    def step(*inputs):
        return [function(x, 0.9) for (function, _), x in zip(public.values(), inputs, strict=True)]

    inputs = [x.clone().requires_grad_() for _, x in public.values()]
    runs = []
    for function in (step, torch.compile(step, fullgraph=True)):
        values = function(*inputs)
        total = sum(value.sum() for value in values)
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        runs.append([*(value.detach() for value in values), *gradients])
    torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: on the CPU auto is not triton")
def test_auto_is_triton():
    assert dispatch.resolve("auto", torch.empty(0)) == "triton"
    inputs = loss_inputs(2, 3, 11)
    by_name = ppo_kernels.ppo_loss(**inputs, backend="triton")
    torch.testing.assert_close(ppo_kernels.ppo_loss(**inputs), by_name, rtol=0, atol=0)


@pytest.mark.parametrize("place", DEVICES)
def test_runs_where_its_tensors_are(backend, place):
    """Also while another GPU is the current one."""
    inputs = loss_inputs(2, 3, 11)
    expected = ppo_kernels.ppo_loss(**inputs, backend=backend)
    there = {name: x.to(place) for name, x in inputs.items()}
    results = ppo_kernels.ppo_loss(**there, backend=backend)
    assert {str(x.device) for x in results} == {place}
    for result, x in zip(results, expected, strict=True):
        torch.testing.assert_close(result.to(x.device), x, rtol=0, atol=0)


def test_more_rows_than_a_grid_has_in_y(backend):
    logits, ref_logits = torch.randn(2, MANY_ROWS, 37)
    tokens = torch.randint(37, (MANY_ROWS,))
    truth = softmax_truth(logits, tokens, 1.0)[:2]
    eager = ppo_kernels.reference.token_logprobs_and_entropy(logits, tokens)
    results = token_logprobs_and_entropy(logits, tokens, backend=backend)
    for result, x, y in zip(results, eager, truth, strict=True):
        assert_as_exact_as_eager(result, x, y)
    pair = logits, ref_logits
    assert_as_exact_as_eager(
        kl_divergence(*pair, backend=backend),
        ppo_kernels.reference.kl_divergence(*pair),
        ppo_kernels.reference.kl_divergence(*(x.double() for x in pair)),
    )
    inputs = loss_inputs(1, MANY_ROWS, 37)
    expected, gradient = ppo_loss_truth(**inputs)
    logits = inputs["logits"].clone()
    results = ppo_loss_(**(inputs | {"logits": logits}), backend=backend)
    torch.testing.assert_close(results.loss, expected.loss.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-4, atol=1e-4 / MANY_ROWS)


def last_rows(x):
    return x[-2:].clone()


def test_offsets_beyond_int32(backend):
    """The last rows of a tensor of more than 2^31 elements are what they are alone, bit for bit."""
    logits = torch.randn(LARGE, dtype=torch.bfloat16)
    ref_logits = torch.randn(LARGE, dtype=torch.bfloat16)
    tokens = torch.randint(LARGE[1], LARGE[:1])
    per_token = torch.randn(2, LARGE[0])
    old_logprobs, advantages = per_token[0] - 12, per_token[1]

    alone = token_logprobs_and_entropy(last_rows(logits), last_rows(tokens), backend=backend)
    whole = token_logprobs_and_entropy(logits, tokens, backend=backend)
    torch.testing.assert_close([last_rows(x) for x in whole], list(alone), rtol=0, atol=0)

    leaf = logits.requires_grad_()
    kl = kl_divergence(leaf, ref_logits, backend=backend)
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    leaf_alone = last_rows(logits.detach()).requires_grad_()
    kl_alone = kl_divergence(leaf_alone, last_rows(ref_logits), backend=backend)
    (gradient_alone,) = torch.autograd.grad(kl_alone.sum(), leaf_alone)
    torch.testing.assert_close(last_rows(kl), kl_alone, rtol=0, atol=0)
    torch.testing.assert_close(last_rows(gradient), gradient_alone, rtol=0, atol=0)
    del gradient, leaf

    arguments = tokens, old_logprobs, advantages
    options = {"entropy_coef": 0.1, "denominator": 1.0, "backend": backend}
    logits = logits.detach()
    logits_alone = last_rows(logits)
    ppo_loss_(logits_alone, *map(last_rows, arguments), **options)
    ppo_loss_(logits, *arguments, **options)
    torch.testing.assert_close(last_rows(logits), logits_alone, rtol=0, atol=0)
