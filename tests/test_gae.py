"""gae and gae_packed."""

import math

import pytest
import torch

from ppo_kernels import gae, gae_packed
from tests.conftest import (
    CUDA,
    DTYPES,
    TRITON,
    assert_as_exact_as_eager,
    emulates_a_gpu,
    on_default_device,
    skip_if_emulated,
    thread_counts,
    waits_for_nothing,
)

GAMMA, LAM = 0.97, 0.9


def by_definition(rewards, values, mask=None, dones=None, bootstrap=0.0):
    """One row as lists, from the definition: A_t = Σ_l (γλ)^l δ_(t+l) over the trajectory's tokens.

    Not the recursion that is tested. Returns lists, 0 where masked out. A done ends the trajectory
    wherever it stands.
    """
    kept = [t for t in range(len(rewards)) if mask is None or mask[t]]
    ends = [*kept[1:], len(rewards)]
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for i, t in enumerate(kept):
        total = 0.0
        for power, j in enumerate(range(i, len(kept))):
            s = kept[j]
            done = dones is not None and any(dones[s : ends[j]])
            following = values[kept[j + 1]] if j + 1 < len(kept) else bootstrap
            delta = rewards[s] + (0.0 if done else GAMMA * following) - values[s]
            total += (GAMMA * LAM) ** power * delta
            if done:
                break
        advantages[t], returns[t] = total, total + values[t]
    return advantages, returns


def truth_of(rewards, values, mask=None, dones=None, bootstrap_values=None):
    rows = []
    for i in range(len(rewards)):
        rows.append(
            by_definition(
                rewards[i].tolist(),
                values[i].tolist(),
                None if mask is None else mask[i].tolist(),
                None if dones is None else dones[i].tolist(),
                0.0 if bootstrap_values is None else bootstrap_values[i].item(),
            )
        )
    return tuple(torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))


def inputs(batch, length, dtype=torch.float64):
    return {
        "rewards": torch.randn(batch, length).to(dtype),
        "values": torch.randn(batch, length).to(dtype),
        "mask": torch.rand(batch, length) < 0.7,
        "dones": torch.rand(batch, length) < 0.15,
        "bootstrap_values": torch.randn(batch).to(dtype),
    }


def test_worked_example(backend):
    """Augmented rewards (score 5, β = 0.1), then advantages."""
    logprobs = torch.tensor([[-0.9, -2.5, -0.5]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -0.5]])
    rewards = -0.1 * (logprobs - ref_logprobs)
    rewards[:, -1] += 5
    torch.testing.assert_close(rewards, torch.tensor([[-0.06, 0.15, 5.00]]))
    values = torch.tensor([[3.0, 3.5, 4.0]])
    result = gae(rewards, values, gamma=0.9, lam=0.8, backend=backend)
    torch.testing.assert_close(result.advantages, torch.tensor([[0.7884, 0.97, 1.0]]))
    torch.testing.assert_close(result.returns, torch.tensor([[3.7884, 4.47, 5.0]]))
    deltas = gae(rewards, values, gamma=0.9, lam=0.0, backend=backend).advantages
    torch.testing.assert_close(deltas, torch.tensor([[0.09, 0.25, 1.0]]))


@pytest.mark.parametrize("given", ((), ("mask",), ("dones",), ("bootstrap_values",), "all"))
@pytest.mark.parametrize("length", (1, 2, 15, 16, 17, 33, 70))
def test_matches_the_definition(backend, length, given):
    drawn = inputs(5, length)
    if given == "all":
        given = ("mask", "dones", "bootstrap_values")
    optional = {name: drawn[name] for name in given}
    result = gae(
        drawn["rewards"], drawn["values"], gamma=GAMMA, lam=LAM, backend=backend, **optional
    )
    truth = truth_of(drawn["rewards"], drawn["values"], **optional)
    for ours, true in zip(result, truth, strict=True):
        torch.testing.assert_close(ours, true, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_a_plain_loop(backend, dtype):
    drawn = inputs(4, 1000, dtype)
    result = gae(**drawn, gamma=GAMMA, lam=LAM, backend=backend)
    exact = {k: x.double() if x.is_floating_point() else x for k, x in drawn.items()}
    plain = {k: x.float() if x.is_floating_point() else x for k, x in drawn.items()}
    truth = gae(**exact, gamma=GAMMA, lam=LAM, backend="reference")
    loop = gae(**plain, gamma=GAMMA, lam=LAM, backend="reference")
    if dtype == torch.float64:
        loop = truth
    for ours, theirs, true in zip(result, loop, truth, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_as_exact_as_eager(ours, theirs, true)


def test_undiscounted_long_rows(backend):
    """γ = λ = 1: the advantage is what is left to come, less the value; nothing may decay."""
    rewards, values = torch.randn(2, 1, 5000, dtype=torch.float64)
    result = gae(rewards, values, gamma=1.0, lam=1.0, backend=backend)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(result.returns, to_come, atol=1e-10, rtol=0)
    torch.testing.assert_close(result.advantages, to_come - values, atol=1e-10, rtol=0)


def test_masked_out_positions_are_skipped(backend):
    """Tool output inside a row breaks no trajectory: as if those tokens were not there."""
    drawn = inputs(1, 40)
    mask = drawn.pop("mask")
    drawn["dones"] &= mask
    whole = gae(**drawn, mask=mask, gamma=GAMMA, lam=LAM, backend=backend)
    kept = {k: x[mask][None] if x.ndim == 2 else x for k, x in drawn.items()}
    alone = gae(**kept, gamma=GAMMA, lam=LAM, backend=backend)
    for skipped, short in zip(whole, alone, strict=True):
        torch.testing.assert_close(skipped[mask][None], short, atol=1e-14, rtol=0)
        assert (skipped[~mask] == 0).all()


@pytest.mark.parametrize("garbage", (math.nan, math.inf))
def test_nothing_leaks_from_masked_out_positions(backend, garbage):
    drawn = inputs(3, 50)
    clean = gae(**drawn, gamma=GAMMA, lam=LAM, backend=backend)
    for name in ("rewards", "values"):
        drawn[name] = drawn[name].masked_fill(~drawn["mask"], garbage)
    dirty = gae(**drawn, gamma=GAMMA, lam=LAM, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("lam", (0.0, 0.5))
def test_nan_is_not_lost_on_its_way_back(backend, lam):
    """Also where its weight, 0.5 ** 199 or 0, is less than the smallest number."""
    rewards, values = torch.randn(2, 1, 200)
    rewards[0, -1] = math.nan
    advantages, returns = gae(rewards, values, gamma=0.5, lam=lam, backend=backend)
    assert advantages.isnan().all()
    assert returns.isnan().all()


@pytest.mark.parametrize("length", (4, 40, 700))
def test_a_done_that_does_not_count_cuts_too(backend, length):
    """Also within a vector, between chunks, and before the bootstrap value."""
    rewards, values = torch.randn(2, 1, length, dtype=torch.float64)
    dones = torch.zeros(1, length, dtype=torch.bool)
    dones[:, length // 2] = dones[:, -1] = True
    rewards[:, length // 2] = math.nan
    bootstrap = torch.tensor([math.nan]).double()
    result = gae(
        rewards,
        values,
        ~dones,
        dones=dones,
        bootstrap_values=bootstrap,
        gamma=GAMMA,
        lam=LAM,
        backend=backend,
    )
    for part in (slice(0, length // 2), slice(length // 2 + 1, length - 1)):
        alone = gae(rewards[:, part], values[:, part], gamma=GAMMA, lam=LAM, backend=backend)
        for whole, short in zip(result, alone, strict=True):
            torch.testing.assert_close(whole[:, part], short, atol=1e-13, rtol=0)
    assert (result.advantages[dones] == 0).all()


@pytest.mark.parametrize("garbage", (math.nan, math.inf))
def test_nothing_leaks_across_a_done(backend, garbage):
    rewards, values = torch.randn(2, 1, 50)
    dones = torch.arange(50)[None] == 20
    clean = gae(rewards, values, dones=dones, gamma=GAMMA, lam=LAM, backend=backend)
    rewards[:, 21:], values[:, 21:] = garbage, garbage
    bootstrap = torch.tensor([garbage])
    dirty = gae(
        rewards,
        values,
        dones=dones,
        bootstrap_values=bootstrap,
        gamma=GAMMA,
        lam=LAM,
        backend=backend,
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:, :21], b[:, :21])


def test_done_on_the_last_token_ignores_the_bootstrap(backend):
    rewards, values = torch.randn(2, 2, 8)
    dones = torch.zeros(2, 8, dtype=torch.bool)
    dones[0, -1] = True
    without = gae(rewards, values, gamma=GAMMA, lam=LAM, backend=backend).advantages
    given = gae(
        rewards,
        values,
        dones=dones,
        bootstrap_values=torch.full((2,), 7.0),
        gamma=GAMMA,
        lam=LAM,
        backend=backend,
    ).advantages
    assert torch.equal(given[0], without[0])
    assert given[1, -1].item() == pytest.approx(without[1, -1].item() + GAMMA * 7, abs=1e-5)


def test_row_without_a_counted_token(backend):
    rewards, values = torch.randn(2, 2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0] = False
    advantages, returns = gae(rewards, values, mask, gamma=GAMMA, lam=LAM, backend=backend)
    assert (advantages[0] == 0).all()
    assert (returns[0] == 0).all()
    assert (advantages[1] != 0).all()


@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (1, 1), (20000, 3)))
def test_sizes(backend, shape):
    if shape == (20000, 3):
        skip_if_emulated(backend)
    rewards, values = torch.randn(2, *shape, dtype=torch.float64)
    advantages, returns = gae(rewards, values, gamma=GAMMA, lam=LAM, backend=backend)
    assert advantages.shape == returns.shape == shape
    if math.prod(shape):
        truth = truth_of(rewards[-5:], values[-5:])
        torch.testing.assert_close(advantages[-5:], truth[0], atol=1e-14, rtol=0)


def test_strided_inputs(backend):
    rewards, values = torch.randn(30, 4, 2).unbind(-1)
    mask = torch.rand(30, 4) < 0.7
    copied = gae(
        rewards.t().contiguous(),
        values.t().contiguous(),
        mask.t().contiguous(),
        gamma=GAMMA,
        lam=LAM,
        backend=backend,
    )
    viewed = gae(rewards.t(), values.t(), mask.t(), gamma=GAMMA, lam=LAM, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(viewed, copied, strict=True))


def test_carries_no_gradient(backend):
    rewards, values = (x.requires_grad_() for x in torch.randn(2, 3, 4))
    for x in gae(rewards, values, gamma=GAMMA, lam=LAM, backend=backend):
        assert not x.requires_grad


def test_mixed_dtypes(backend):
    drawn = inputs(3, 20)
    exact = gae(**drawn, gamma=GAMMA, lam=LAM, backend=backend)
    drawn["rewards"] = drawn["rewards"].float()
    mixed = gae(**drawn, gamma=GAMMA, lam=LAM, backend=backend)
    assert mixed.advantages.dtype == torch.float64
    torch.testing.assert_close(mixed.advantages, exact.advantages, atol=1e-6, rtol=0)


def test_a_row_is_bitwise_the_same_wherever_it_stands(fused, set_threads):
    row = {k: x for k, x in inputs(1, 3001, torch.float32).items() if k != "bootstrap_values"}
    seen = []
    for threads in thread_counts(fused):
        set_threads(threads)
        for before, after in (
            ((0, 0), (1, 0)) if emulates_a_gpu(fused) else ((0, 2), (1, 2), (6, 2))
        ):
            batch = inputs(before + 1 + after, 3001, torch.float32)
            batch.pop("bootstrap_values")
            for name, x in row.items():
                batch[name][before] = x[0]
            result = gae(**batch, gamma=GAMMA, lam=LAM, backend=fused)
            seen.append([x[before] for x in result])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_packed_is_bitwise_the_rows(backend, dtype):
    """Empty trajectories too, at both ends and inside."""
    lengths = (0, 5, 1, 0, 64, 33, 0)
    bounds = torch.tensor((0, *lengths)).cumsum(0).to(dtype)
    drawn = {k: x[0] for k, x in inputs(1, sum(lengths)).items() if k != "bootstrap_values"}
    bootstrap = torch.randn(len(lengths), dtype=torch.float64)
    packed = gae_packed(
        **drawn,
        cu_seqlens=bounds,
        bootstrap_values=bootstrap,
        gamma=GAMMA,
        lam=LAM,
        backend=backend,
    )
    for i in range(len(lengths)):
        row = slice(bounds[i], bounds[i + 1])
        alone = gae(
            **{name: x[None, row] for name, x in drawn.items()},
            bootstrap_values=bootstrap[i : i + 1],
            gamma=GAMMA,
            lam=LAM,
            backend=backend,
        )
        for whole, part in zip(packed, alone, strict=True):
            assert torch.equal(whole[row], part[0])


def test_packed_without_trajectories(backend):
    result = gae_packed(
        torch.empty(0), torch.empty(0), torch.tensor([0]), gamma=1.0, lam=1.0, backend=backend
    )
    assert result.advantages.shape == result.returns.shape == (0,)


BAD_BOUNDS = ([1, 6], [0, 5], [0, 7], [0, 4, 3, 6], [0, -2, 6], [0, 8, 6])


@pytest.mark.parametrize("bounds", (*BAD_BOUNDS, [0]))
def test_bad_boundaries_are_named(backend, bounds):
    if waits_for_nothing(backend) and len(bounds) > 1:
        pytest.skip("they are looked at on the GPU, without waiting for it")
    with pytest.raises(ValueError, match="cu_seqlens must"):
        gae_packed(
            torch.ones(6), torch.ones(6), torch.tensor(bounds), gamma=1.0, lam=1.0, backend=backend
        )


@pytest.mark.parametrize("fused", (*CUDA, *TRITON), indirect=True)
@pytest.mark.parametrize("bounds", BAD_BOUNDS)
def test_bad_boundaries_let_nothing_in_from_outside(fused, bounds):
    """Undefined results, but of the six tokens alone."""
    around = torch.full((2, 18), 1e6)
    around[:, 6:12] = torch.arange(6)
    results = gae_packed(*around[:, 6:12], torch.tensor(bounds), gamma=1.0, lam=1.0, backend=fused)
    for x in results:
        assert (x.nan_to_num().abs() < 100).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rewards": torch.ones(6)}, ValueError, r"rewards must have shape \(B, T\), got \(6,\)"),
        ({"rewards": torch.ones(2, 3).int()}, TypeError, "rewards must be float32.*int32"),
        ({"values": torch.ones(2, 4)}, ValueError, r"values must have shape \(2, 3\).*\(2, 4\)"),
        ({"values": torch.ones(2, 3, device="meta")}, ValueError, "values must be on .*got meta"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor.*float32"),
        ({"mask": torch.ones(3, 2).bool()}, ValueError, r"mask must have shape \(2, 3\)"),
        ({"dones": torch.ones(2, 3).long()}, TypeError, "dones must be a bool tensor.*int64"),
        ({"gamma": 1.1}, ValueError, "gamma must be <= 1, got 1.1"),
        ({"gamma": -0.1}, ValueError, "gamma must be >= 0, got -0.1"),
        ({"lam": math.nan}, ValueError, "lam must be finite, got nan"),
        ({"lam": "0.5"}, TypeError, "lam must be a Python number, got str"),
        (
            {"bootstrap_values": torch.ones(3)},
            ValueError,
            r"bootstrap_values must have shape \(2,\).*\(3,\)",
        ),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(backend, arguments, error, message):
    good = {"rewards": torch.ones(2, 3), "values": torch.ones(2, 3), "gamma": 0.9, "lam": 0.9}
    with pytest.raises(error, match=message):
        gae(**good | on_default_device(arguments), backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rewards": torch.ones(2, 3)}, ValueError, r"rewards must have shape \(N,\)"),
        ({"cu_seqlens": torch.ones(2)}, TypeError, "cu_seqlens must be an int64 or int32.*float32"),
        (
            {"cu_seqlens": torch.ones(2, 2).long()},
            ValueError,
            r"cu_seqlens must have shape \(B \+ 1,\), got \(2, 2\)",
        ),
        ({"cu_seqlens": torch.ones(0).long()}, ValueError, "cu_seqlens must have shape"),
        ({"bootstrap_values": torch.ones(2)}, ValueError, r"bootstrap_values must have shape \(1,"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_of_packed_are_named(backend, arguments, error, message):
    good = {"rewards": torch.ones(6), "values": torch.ones(6), "cu_seqlens": torch.tensor([0, 6])}
    with pytest.raises(error, match=message):
        gae_packed(**good | on_default_device(arguments), gamma=1.0, lam=1.0, backend=backend)
