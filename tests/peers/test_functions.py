"""Our functions against the real ones: values, gradients, shapes and dtypes."""

import inspect

import pytest
import torch

from ppo_kernels import integrations
from ppo_kernels.integrations import openrlhf, torchrl, trl, verl

TRL = "trl.trainer.utils"
VERL, VERL_PPO = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
OPENRLHF = "openrlhf.models.utils"
TORCHRL = "torchrl.objectives.value.functional"
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Of the largest number; a peer rounds to the logits' dtype more often than once.
ROUNDINGS = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 2e-2}


def assert_same(ours, theirs, dtype):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    scale = theirs.abs().max().clamp(min=1).item() if theirs.numel() else 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDINGS[dtype] * scale)


def assert_same_with_gradients(ours, theirs, arguments, dtype):
    """`arguments`: tensors and more; results are a tensor or a tuple of them."""
    results = []
    for function in (ours, theirs):
        leaves = [
            x.detach().clone().requires_grad_()
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for x in arguments
        ]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.linspace(-1, 2, x.numel()).reshape(x.shape).to(x.dtype) for x in outputs]
        inputs = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        grads = torch.autograd.grad(outputs, inputs, weights)
        results.append((*outputs, *grads))
    for x, y in zip(*results, strict=True):
        assert_same(x, y, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("peer", "ours", "more"),
    [
        (TRL, trl.selective_log_softmax, ()),
        (TRL, trl.selective_log_softmax, (3,)),
        (TRL, trl.selective_log_softmax, (0,)),
        (TRL, trl.entropy_from_logits, None),
        (VERL, verl.logprobs_from_logits, ()),
        (VERL, verl.entropy_from_logits, None),
        (VERL, verl.entropy_from_logits_with_chunking, None),
        (OPENRLHF, openrlhf.log_probs_from_logits, ()),
        (OPENRLHF, openrlhf.compute_entropy, None),
    ],
    indirect=["peer"],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_functions_of_logits(peer, ours, more, dtype):
    """`more`: dimensions of the index beside those of the rows; None where there is no index."""
    chunked = "chunking" in ours.__name__
    rows = (15,) if chunked else (3, 5)
    logits = (2 * torch.randn(*rows, 101)).to(dtype)
    arguments = (logits,) if more is None else (logits, torch.randint(101, (*rows, *more)))
    theirs = getattr(peer, ours.__name__)
    if chunked and dtype != torch.float32:
        # verl's fills a result without graph, in fp32.
        assert_same(ours(logits), theirs(logits), torch.float32)
        return
    assert_same_with_gradients(ours, theirs, arguments, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peer", [TRL], indirect=True)
def test_later_trl(peer, dtype):
    if not hasattr(peer, "selective_log_softmax_and_entropy"):
        pytest.skip("this TRL is older than 1.14")
    logits, index = (2 * torch.randn(3, 5, 101)).to(dtype), torch.randint(101, (3, 5))
    row_mask = torch.rand(3, 5) < 0.7
    for name, more in (
        ("selective_log_softmax", (0.7, row_mask)),
        ("selective_log_softmax_and_entropy", (True, 0.7, row_mask)),
    ):
        functions = getattr(trl, name), getattr(peer, name)
        assert_same_with_gradients(*functions, (logits, index, *more), dtype)


@pytest.fixture
def trl_kernels():
    older = "trl is not installed or older than 1.15"
    module = pytest.importorskip("trl.kernels", reason=older, exc_type=ImportError)
    if not hasattr(module, "ChunkedLogProbFunction"):
        pytest.skip(older)
    return module


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")])
@pytest.mark.parametrize("rows", [13, 0])
@pytest.mark.parametrize(
    ("dtype", "head", "autocast"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
    ],
)
def test_trl_hidden_states(trl_kernels, dtype, head, autocast, rows, outputs):
    arguments = (
        torch.randn(rows, 24, dtype=dtype),
        *(torch.randn(101, *d).div(4).to(head) for d in ((24,), ())),
        torch.randint(101, (rows,)),
        *(0.7, 16, 3.0, 0.5, outputs),
    )

    def run(function):
        def scored(*x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results = function.apply(*x)
            assert results[len(outputs) :] == (None,) * (5 - len(outputs))
            return results[: len(outputs)]

        return scored

    rounded = torch.bfloat16 if autocast else head
    ours, theirs = trl.ChunkedLogProbFunction, trl_kernels.ChunkedLogProbFunction
    assert_same_with_gradients(run(ours), run(theirs), arguments, rounded)


@pytest.mark.parametrize(
    ("scale", "outputs"),
    [(1.0, None), (1.0, ("log_probs", "is_top1")), (-2.0, ("log_probs", "entropy"))],
)
def test_trl_hidden_states_handed_on(trl_kernels, scale, outputs):
    arguments = torch.randn(13, 24), torch.randn(101, 24), None, torch.randint(101, (13,)), 0.7, 16
    arguments = (*arguments, None, scale, *([outputs] if outputs else []))
    expected = trl_kernels.ChunkedLogProbFunction.apply(*arguments)
    with integrations.patch("trl"), integrations.patch("trl"):
        assert trl_kernels.ChunkedLogProbFunction is trl.ChunkedLogProbFunction
        results = trl_kernels.ChunkedLogProbFunction.apply(*arguments)
    for x, y in zip(results, expected, strict=True):
        assert x is y is None or torch.equal(x, y)


@pytest.mark.parametrize("peer", [OPENRLHF], indirect=True)
def test_openrlhf_divides_the_logits_by_the_temperature_in_place(peer):
    logits, labels = torch.randn(2, 4, 33), torch.randint(33, (2, 4))
    ours, theirs = logits.clone(), logits.clone()
    result = openrlhf.log_probs_from_logits(ours, labels, temperature=0.7)
    expected = peer.log_probs_from_logits(theirs, labels, temperature=0.7)
    assert_same(result, expected, torch.float32)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("peer", [TORCHRL], indirect=True)
@pytest.mark.parametrize("ours", torchrl.REPLACES[TORCHRL], ids=lambda x: x.__name__)
@pytest.mark.parametrize(
    ("shape", "time_dim"),
    [
        ((4, 40, 1), -2),
        ((3, 40, 2), -2),
        ((40, 2), -2),
        ((4, 40), -1),
        ((40,), -1),
        ((2, 40, 3), 1),
    ],
)
def test_torchrl_gae(peer, ours, shape, time_dim):
    """Next values of their own, and ends of which half are truncations."""
    arguments = torch.randn(3, *shape)
    done = torch.rand(shape) < 0.2
    terminated = done & (torch.rand(shape) < 0.5)
    assert (done & ~terminated).any()

    def run(function):
        return lambda *x: function(0.97, 0.9, *x, done, terminated, time_dim=time_dim)

    theirs = getattr(peer, ours.__name__)
    assert_same_with_gradients(run(ours), run(theirs), arguments, torch.float32)


@pytest.mark.parametrize("peer", [TORCHRL], indirect=True)
@pytest.mark.parametrize("ours", torchrl.REPLACES[TORCHRL], ids=lambda x: x.__name__)
@pytest.mark.parametrize("which", ("gamma", "lmbda", "both"))
def test_torchrl_factors_of_each_step(peer, ours, which):
    """With their gradients, and a gamma above 1."""
    done = torch.rand(4, 40, 1) < 0.2
    gamma = 0.9 + 0.2 * torch.rand(4, 40, 1) if which != "lmbda" else torch.tensor(1.02)
    lmbda = torch.rand(4, 40, 1) if which != "gamma" else torch.tensor(0.9)
    arguments = [gamma, lmbda, *(torch.randn(4, 40, 1) for _ in range(3))]

    def run(function):
        return lambda *x: function(*x, done)

    theirs = getattr(peer, ours.__name__)
    assert_same_with_gradients(run(ours), run(theirs), arguments, torch.float32)


@pytest.mark.parametrize("peer", [TORCHRL], indirect=True)
@pytest.mark.parametrize("ours", torchrl.REPLACES[TORCHRL], ids=lambda x: x.__name__)
@pytest.mark.parametrize("value", DTYPES)
@pytest.mark.parametrize("next_value", DTYPES)
@pytest.mark.parametrize("reward", DTYPES)
def test_torchrl_mixed_dtypes(peer, ours, value, next_value, reward):
    dtypes = value, next_value, reward
    arguments = [torch.randn(4, 40, 1).to(x) for x in dtypes]
    done = torch.rand(4, 40, 1) < 0.2

    def run(function):
        return lambda *x: function(0.97, 0.9, *x, done)

    # γ of a Python number is fp32 in torchrl's products.
    coarsest = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
    assert_same_with_gradients(run(ours), run(getattr(peer, ours.__name__)), arguments, coarsest)


@pytest.mark.parametrize("peer", [TORCHRL], indirect=True)
def test_torchrl_module_runs_on_ours(peer, monkeypatch):
    """torchrl's `GAE`, built within, in its default form, and back on its own afterwards."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.objectives.value import GAE

    critic = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["obs"], out_keys=["state_value"])
    done = torch.rand(4, 30, 1) < 0.2
    data = TensorDict(
        {
            "obs": torch.randn(4, 30, 3),
            "next": {
                "obs": torch.randn(4, 30, 3),
                "reward": torch.randn(4, 30, 1),
                "done": done,
                "terminated": done & (torch.rand(4, 30, 1) < 0.5),
            },
        },
        [4, 30],
    )
    calls = []
    real = torchrl.discounted_sums
    monkeypatch.setattr(
        torchrl, "discounted_sums", lambda *x, **k: calls.append(1) or real(*x, **k)
    )
    expected = GAE(gamma=0.99, lmbda=0.95, value_network=critic)(data.clone())
    assert not calls
    with integrations.patch("torchrl"):
        result = GAE(gamma=0.99, lmbda=0.95, value_network=critic)(data.clone())
    assert len(calls) == 1
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(result[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("peer", [VERL_PPO], indirect=True)
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verl_gae(peer, mask_dtype, dtype):
    """Also at the positions masked out: in front, between and behind."""
    rewards, values = torch.randn(2, 6, 40, dtype=dtype)
    mask = (torch.rand(6, 40) < 0.7).to(mask_dtype)
    mask[0] = 0
    mask[1, 20:] = 0
    mask[2] = 1
    arguments = (rewards, values, mask, 0.97, 0.9)
    result = verl.compute_gae_advantage_return(*arguments)
    expected = peer.compute_gae_advantage_return(*arguments)
    for x, y in zip(result, expected, strict=True):
        # n / (n - 1) is fp32 in verl, whatever the dtype.
        assert_same(x, y, torch.float32)


@pytest.mark.parametrize("peer", [VERL_PPO], indirect=True)
@pytest.mark.parametrize("count", [0, 1])
def test_verl_gae_refuses_what_verl_refuses(peer, count):
    mask = torch.zeros(2, 5, dtype=torch.int64)
    mask[0, :count] = 1
    arguments = (torch.randn(2, 5), torch.randn(2, 5), mask, 1.0, 0.95)
    for module in (peer, verl):
        with pytest.raises(ValueError, match="mask"):
            module.compute_gae_advantage_return(*arguments)


@pytest.mark.parametrize("peer", [VERL_PPO], indirect=True)
def test_verl_registry_is_patched(peer):
    original = peer.get_adv_estimator_fn("gae")
    with integrations.patch("verl"):
        assert peer.get_adv_estimator_fn("gae") is verl.compute_gae_advantage_return
        assert peer.verl_F.logprobs_from_logits is verl.logprobs_from_logits
    assert peer.get_adv_estimator_fn("gae") is original


@pytest.mark.parametrize(
    ("peer", "name"),
    [(TRL, "trl"), (VERL, "verl"), (OPENRLHF, "openrlhf"), (TORCHRL, "torchrl")],
    indirect=["peer"],
)
def test_patch_and_back(peer, name):
    module = integrations._PEERS[name]
    functions = {x.__name__: x for x in module.REPLACES[peer.__name__]}
    originals = {key: getattr(peer, key) for key in functions}
    with integrations.patch(name):
        assert {key: getattr(peer, key) for key in functions} == functions
    assert {key: getattr(peer, key) for key in functions} == originals
    assert all(inspect.getmodule(x) is not module for x in originals.values())
