"""Functions of other packages on our ops, against formulas, and `patch` on a package made here.

`tests/peers` has the real packages, where they are installed.
"""

import gc
import sys
import types

import pytest
import torch

from ppo_kernels import integrations
from ppo_kernels.integrations import common, openrlhf, trl, verl

PEER = """
def selective_log_softmax(logits, index):
    return "theirs"

def entropy_from_logits(logits: float, chunk_size: int = 128):
    return "theirs"

REGISTRY = {"entropy": entropy_from_logits}
"""
OURS = (trl.selective_log_softmax, trl.entropy_from_logits)
TRAINER = "from somepeer.utils import selective_log_softmax as scored, entropy_from_logits\n"


@pytest.fixture
def somepeer(tmp_path, monkeypatch):
    """A package whose functions are named as TRL's, one module of it not imported yet."""
    folder = tmp_path / "somepeer"
    folder.mkdir()
    sources = {"__init__": "", "utils": PEER, "trainer": TRAINER, "late": TRAINER}
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    peer = types.SimpleNamespace(
        REPLACES={"somepeer.utils": OURS},
        REPLACES_IN_LATER_VERSIONS={"somepeer.utils": (trl.selective_log_softmax_and_entropy,)},
    )
    monkeypatch.setitem(integrations._PEERS, "somepeer", peer)
    import somepeer.trainer

    yield somepeer
    for name in [name for name in sys.modules if name.partition(".")[0] == "somepeer"]:
        del sys.modules[name]


def holders(somepeer):
    utils, trainer = somepeer.utils, somepeer.trainer
    return [
        [utils.selective_log_softmax, trainer.scored],
        [utils.entropy_from_logits, trainer.entropy_from_logits, utils.REGISTRY["entropy"]],
    ]


def held_by(somepeer, functions):
    return all(
        x is function
        for found, function in zip(holders(somepeer), functions, strict=True)
        for x in found
    )


def test_patch_reaches_every_holder_and_gives_back(somepeer):
    theirs = [found[0] for found in holders(somepeer)]
    for _ in range(2):
        with integrations.patch("somepeer"):
            assert held_by(somepeer, OURS)
        assert held_by(somepeer, theirs)


def test_patch_gives_back_after_an_exception(somepeer):
    theirs = [found[0] for found in holders(somepeer)]
    with pytest.raises(KeyboardInterrupt), integrations.patch("somepeer"):
        raise KeyboardInterrupt
    assert held_by(somepeer, theirs)


def test_patch_may_be_nested(somepeer):
    theirs = [found[0] for found in holders(somepeer)]
    with integrations.patch("somepeer"):
        with integrations.patch("somepeer"):
            assert held_by(somepeer, OURS)
        assert held_by(somepeer, OURS)
    assert held_by(somepeer, theirs)


def test_patch_between_enable_and_disable(somepeer):
    theirs = [found[0] for found in holders(somepeer)]
    patch = integrations.patch("somepeer")
    for _ in range(2):
        patch.enable()
        gc.collect()
        assert held_by(somepeer, OURS)
        with integrations.patch("somepeer"):
            pass
        assert held_by(somepeer, OURS)
        patch.disable()
        assert held_by(somepeer, theirs)


def test_patch_that_nobody_keeps_stays_enabled(somepeer):
    theirs = [found[0] for found in holders(somepeer)]
    integrations.patch("somepeer").enable()
    gc.collect()
    assert held_by(somepeer, OURS)
    for found, function in zip(OURS, theirs, strict=True):
        integrations._replace("somepeer", found, function)


def test_patch_that_is_not_enabled_cannot_be_disabled(somepeer):
    patch = integrations.patch("somepeer")
    with patch:
        pass
    with pytest.raises(RuntimeError, match=r"patch\('somepeer'\) must be enabled"):
        patch.disable()


def test_patch_as_a_decorator_of_a_function_that_calls_itself(somepeer):
    theirs = [found[0] for found in holders(somepeer)]

    @integrations.patch("somepeer")
    def run(depth):
        if depth:
            run(depth - 1)
        assert held_by(somepeer, OURS)

    for _ in range(2):
        run(2)
        assert held_by(somepeer, theirs)


def test_modules_imported_within_are_given_back_too(somepeer):
    theirs = [found[0] for found in holders(somepeer)]
    with integrations.patch("somepeer"):
        import somepeer.late

        assert somepeer.late.scored is OURS[0]
    assert (somepeer.late.scored, somepeer.late.entropy_from_logits) == tuple(theirs)


def test_patch_leaves_other_packages_alone(somepeer, monkeypatch):
    stranger = types.ModuleType("somepeers")
    stranger.function = somepeer.utils.selective_log_softmax
    monkeypatch.setitem(sys.modules, "somepeers", stranger)
    with integrations.patch("somepeer"):
        assert stranger.function is not OURS[0]


def test_patch_refuses_another_signature_and_changes_nothing(somepeer):
    def entropy_from_logits(logits, chunk_size=64):
        pass

    somepeer.utils.entropy_from_logits = entropy_from_logits
    before = somepeer.utils.selective_log_softmax
    with (
        pytest.raises(TypeError, match=r"entropy_from_logits .*chunk_size=128.*chunk_size=64"),
        integrations.patch("somepeer"),
    ):
        pass
    assert somepeer.utils.selective_log_softmax is before


def test_patch_refuses_what_is_gone(somepeer):
    del somepeer.utils.entropy_from_logits
    with (
        pytest.raises(AttributeError, match=r"somepeer\.utils has no entropy_from_logits"),
        integrations.patch("somepeer"),
    ):
        pass


def test_patch_takes_what_later_versions_have(somepeer):
    """A function of its own, and options that the fixture's older version lacks."""

    def selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
    ):
        pass

    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        pass

    somepeer.utils.selective_log_softmax = selective_log_softmax
    somepeer.utils.selective_log_softmax_and_entropy = selective_log_softmax_and_entropy
    with integrations.patch("somepeer"):
        ours = trl.selective_log_softmax_and_entropy
        assert somepeer.utils.selective_log_softmax_and_entropy is ours
        assert somepeer.utils.selective_log_softmax is OURS[0]
    assert somepeer.utils.selective_log_softmax_and_entropy is selective_log_softmax_and_entropy


def test_patch_names_what_is_missing(monkeypatch):
    missing = types.SimpleNamespace(REPLACES={"no_such_peer.utils": OURS})
    monkeypatch.setitem(integrations._PEERS, "no_such_peer", missing)
    with (
        pytest.raises(ImportError, match=r"no_such_peer\.utils.*No module named"),
        integrations.patch("no_such_peer"),
    ):
        pass


def test_patch_knows_its_peers():
    with (
        pytest.raises(ValueError, match="peer must be one of trl, verl, openrlhf, torchrl"),
        integrations.patch("tlr"),
    ):
        pass


LOGPROBS = (
    trl.selective_log_softmax,
    verl.logprobs_from_logits,
    openrlhf.log_probs_from_logits,
)
ENTROPIES = (
    trl.entropy_from_logits,
    verl.entropy_from_logits,
    verl.entropy_from_logits_with_chunking,
    openrlhf.compute_entropy,
)


def truth(logits):
    log_p = torch.log_softmax(logits.double(), -1)
    return log_p, -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)


@pytest.mark.parametrize("function", [*LOGPROBS, *ENTROPIES], ids=lambda x: x.__qualname__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_functions_of_logits(function, dtype):
    """-inf logits among them; half precision is the truth rounded once."""
    logits = (3 * torch.randn(6, 41)).to(dtype)
    logits[:, 7] = -torch.inf
    index = torch.randint(8, 41, (6,))
    log_p, entropy = truth(logits)
    if function in LOGPROBS:
        result, expected = function(logits, index), log_p.gather(-1, index[:, None])[:, 0]
    else:
        result, expected = function(logits), entropy
    kept = torch.float32 if function is verl.entropy_from_logits_with_chunking else dtype
    assert result.dtype == kept
    rtol = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8}[kept]
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("is_cuda", "enabled", "dtype", "expected"),
    [
        (True, "cuda", torch.bfloat16, torch.float32),
        (True, "cuda", torch.float16, torch.float32),
        (True, "cuda", torch.float64, torch.float64),
        (True, "cpu", torch.bfloat16, torch.bfloat16),
        (False, "cuda", torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_under_autocast(monkeypatch, is_cuda, enabled, dtype, expected):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == enabled)
    logits = types.SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
    assert common.softmax_dtype(logits) == expected


@pytest.mark.parametrize("peer", [trl, verl, openrlhf], ids=lambda x: x.__name__)
def test_half_precision_logits_under_autocast_on_cuda(monkeypatch, peer):
    monkeypatch.setattr(peer, "softmax_dtype", lambda logits: torch.float32)
    logits, index = torch.randn(6, 41).bfloat16(), torch.randint(41, (6,))
    log_p, entropy = truth(logits)
    chosen = log_p.gather(-1, index[:, None])[:, 0]
    results = [(f(logits, index), chosen) for f in LOGPROBS if f.__module__ == peer.__name__]
    results += [(f(logits), entropy) for f in ENTROPIES if f.__module__ == peer.__name__]
    if peer is trl:
        both = trl.selective_log_softmax_and_entropy(logits, index)
        results += [(trl.selective_log_softmax(logits, index[:, None])[:, 0], chosen)]
        results += zip(both, (chosen, entropy), strict=True)
    assert len(results) >= 2
    for result, expected in results:
        torch.testing.assert_close(result, expected.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("row_mask", [None, torch.ones(3, 4, 0)])
def test_no_tokens_of_a_row(row_mask):
    logits = torch.randn(3, 4, 11).bfloat16().requires_grad_()
    index = torch.zeros(3, 4, 0, dtype=torch.int64)
    result = trl.selective_log_softmax(logits, index, row_mask=row_mask)
    assert (result.shape, result.dtype) == ((3, 4, 0), torch.bfloat16)
    result.sum().backward()
    assert (logits.grad == 0).all()


def test_several_tokens_of_a_row():
    """Also where some, or all of them, have a logit of -inf; with gradients."""
    logits = torch.randn(3, 4, 11, dtype=torch.float64)
    logits[..., :3] = -torch.inf
    index = torch.randint(11, (3, 4, 5))
    index[0, 0] = 1
    index[0, 1, 0] = 0
    expected = truth(logits)[0].gather(-1, index)
    torch.testing.assert_close(trl.selective_log_softmax(logits, index), expected)
    assert (expected[0, 0] == -torch.inf).all()
    logits[..., :3] = -1
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: trl.selective_log_softmax(x, index), logits)


@pytest.mark.parametrize("several", [(), (3,)])
def test_trl_temperature_and_row_mask(several):
    """Rows masked out give 0 and take no gradient, and their ids are not looked at."""
    logits = torch.randn(4, 5, 13, dtype=torch.float64, requires_grad=True)
    index = torch.randint(13, (4, 5, *several))
    row_mask = torch.rand(4, 5) < 0.6
    log_p, entropy = truth(logits.detach() / 0.7)
    expected = log_p.gather(-1, index.reshape(4, 5, -1)).reshape(index.shape)
    masks = row_mask.reshape(4, 5, *len(several) * [1]).expand(index.shape)
    outside = index.masked_fill(~masks, -100)
    result = trl.selective_log_softmax(logits, outside, temperature=0.7, row_mask=masks)
    torch.testing.assert_close(result, expected * masks)
    (grad,) = torch.autograd.grad(result.sum(), logits)
    assert (grad[~row_mask] == 0).all() and (grad[row_mask] != 0).any(-1).all()
    if not several:
        logprobs, entropies = trl.selective_log_softmax_and_entropy(
            logits, outside, temperature=0.7, row_mask=row_mask
        )
        torch.testing.assert_close(logprobs, expected * row_mask)
        torch.testing.assert_close(entropies, entropy * row_mask)
        assert entropies.requires_grad
        _, entropies = trl.selective_log_softmax_and_entropy(logits, index, False)
        assert not entropies.requires_grad


def test_openrlhf_temperature_divides_in_place():
    logits, labels = torch.randn(2, 3, 17), torch.randint(17, (2, 3))
    divided = logits / 0.7
    result = openrlhf.log_probs_from_logits(logits, labels, temperature=0.7)
    assert torch.equal(logits, divided)
    expected = truth(divided)[0].gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


def test_verl_advantages_by_hand():
    """Example of the module `gae`'s tests with a gap: A = (0.7884, 0.97, 1.0), skipped over."""
    rewards = torch.tensor([[-0.06, 9.0, 0.15, 5.0, 9.0]], dtype=torch.float64)
    values = torch.tensor([[3.0, 7.0, 3.5, 4.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0]])
    carried = torch.tensor([[0.7884, 0.97, 0.97, 1.0, 0.0]], dtype=torch.float64)
    counted = carried[mask == 1]
    advantages, returns = verl.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
    torch.testing.assert_close(returns, carried + values)
    torch.testing.assert_close(
        advantages, (carried - counted.mean()) / (counted.var() + 1e-8).sqrt()
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([0, 1, 0], "two positions or more, got 1"),
        ([0, 0, 0], "two positions or more, got 0"),
        ([1, 2, 1], r"0 or 1, got \[1, 2\]"),
        ([1.0, 0.5, 1.0], "0 or 1"),
    ],
)
def test_verl_masks_that_cannot_be(mask, message):
    rewards, values = torch.randn(2, 1, 3)
    with pytest.raises(ValueError, match=message):
        verl.compute_gae_advantage_return(rewards, values, torch.tensor([mask]), 1.0, 1.0)
