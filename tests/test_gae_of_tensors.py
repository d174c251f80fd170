"""gae and gae_packed with gamma and lam of each row or token, and vtrace."""

import math

import pytest
import torch

from ppo_kernels import gae, gae_packed, vtrace
from tests.conftest import emulates_a_gpu, waits_for_nothing
from tests.test_gae import inputs as drawn


def following(kept, i, row):
    """What follows the i-th counted token: (its V, whether the trajectory goes on to a token)."""
    t = kept[i]
    following = kept[i + 1] if i + 1 < len(kept) else len(row["rewards"])
    if row["dones"][t:following].any():
        return 0.0, False
    if i + 1 < len(kept):
        return row["values"][following].item(), True
    return row["bootstrap_values"].item(), False


def by_definition(row, gamma, lam):
    """A_t = Σ_l (Π_{i<l} γ_(t+i) λ_(t+i)) δ_(t+l) over the counted tokens up to a done.

    A done cuts wherever it stands, also between two tokens that count.
    """
    kept = [t for t in range(len(row["rewards"])) if row["mask"][t]]
    advantages, returns = torch.zeros(2, len(row["rewards"]), dtype=torch.float64)
    for i, t in enumerate(kept):
        total, weight = 0.0, 1.0
        for j in range(i, len(kept)):
            s, (value, goes_on) = kept[j], following(kept, j, row)
            total += weight * (row["rewards"][s] + gamma[s] * value - row["values"][s])
            weight *= gamma[s] * lam[s]
            if not goes_on:
                break
        advantages[t], returns[t] = total, total + row["values"][t]
    return advantages, returns


def row_of(inputs, i):
    return {name: x[i] for name, x in inputs.items()}


def truth(inputs, gamma, lam):
    rows = [
        by_definition(row_of(inputs, i), gamma[i], lam[i]) for i in range(len(inputs["rewards"]))
    ]
    return [torch.stack(x) for x in zip(*rows, strict=True)]


def factors(kind, batch, length):
    """(argument, of each token)."""
    if kind == "number":
        return 0.9, torch.full((batch, length), 0.9, dtype=torch.float64)
    if kind == "row":
        x = 0.5 + 0.5 * torch.rand(batch, dtype=torch.float64)
        return x, x[:, None].expand(batch, length)
    x = 0.5 + 0.5 * torch.rand(batch, length, dtype=torch.float64)
    return x, x


@pytest.mark.parametrize(
    "kinds", (("token", "token"), ("row", "number"), ("number", "row"), ("token", "row"))
)
@pytest.mark.parametrize("length", (1, 5, 33))
def test_matches_the_definition(backend, length, kinds):
    inputs = drawn(4, length)
    (gamma, of_gamma), (lam, of_lam) = (factors(kind, 4, length) for kind in kinds)
    result = gae(**inputs, gamma=gamma, lam=lam, backend=backend)
    for ours, true in zip(result, truth(inputs, of_gamma, of_lam), strict=True):
        torch.testing.assert_close(ours, true, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", (130, 3000))
def test_long_rows(backend, length):
    """Of several chunks: against the loop of the specification, which is tested above."""
    if length > 1000 and emulates_a_gpu(backend):
        length = 2100
    inputs = drawn(2, length)
    gamma, lam = factors("token", 2, length)[0], factors("row", 2, length)[0]
    expected = gae(**inputs, gamma=gamma, lam=lam, backend="reference")
    for x, y in zip(gae(**inputs, gamma=gamma, lam=lam, backend=backend), expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=0)


@pytest.mark.parametrize("optional", ((), ("mask",), ("dones",), ("bootstrap_values",)))
def test_equal_factors_are_a_number(backend, optional):
    inputs = drawn(3, 40)
    inputs = {k: x for k, x in inputs.items() if k in ("rewards", "values", *optional)}
    numbers = gae(**inputs, gamma=0.9, lam=0.8, backend=backend)
    gamma, lam = (torch.tensor(x, dtype=torch.float64) for x in (3 * [0.9], 0.8))
    tensors = gae(**inputs, gamma=gamma, lam=lam, backend=backend)
    for x, y in zip(tensors, numbers, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ("row", "token"))
def test_packed_is_the_rows(backend, kind):
    lengths = (0, 5, 1, 0, 64, 33, 0)
    ends = torch.tensor((0, *lengths)).cumsum(0)
    inputs = {k: x[0] for k, x in drawn(1, sum(lengths)).items() if k != "bootstrap_values"}
    bootstrap = torch.randn(len(lengths), dtype=torch.float64)
    size = len(lengths) if kind == "row" else sum(lengths)
    gamma, lam = 0.5 + 0.5 * torch.rand(2, size, dtype=torch.float64)
    call = {"gamma": gamma, "lam": lam, "bootstrap_values": bootstrap, "backend": backend}
    packed = gae_packed(**inputs, **call, cu_seqlens=ends)
    for i in range(len(lengths)):
        row, own = slice(ends[i], ends[i + 1]), slice(i, i + 1)
        factors = (x[own] if kind == "row" else x[None, row] for x in (gamma, lam))
        alone = gae(
            **{name: x[None, row] for name, x in inputs.items()},
            **dict(zip(("gamma", "lam"), factors, strict=True)),
            bootstrap_values=bootstrap[own],
            backend=backend,
        )
        for whole, part in zip(packed, alone, strict=True):
            torch.testing.assert_close(whole[row], part[0], atol=1e-13, rtol=0)


@pytest.mark.parametrize("shape", ((0, 5), (3, 0)))
def test_no_tokens(backend, shape):
    empty, factor = torch.zeros(shape), torch.full(shape[:1], 0.9)
    mask = empty.bool()
    for x in gae(empty, empty, mask, gamma=factor, lam=factor, dones=mask, backend=backend):
        assert x.shape == shape
    for x in vtrace(empty, empty, empty, mask, gamma=0.9, dones=mask, backend=backend):
        assert x.shape == shape


@pytest.mark.parametrize("name", ("gamma", "lam"))
def test_bad_factors_are_named(backend, name):
    inputs, good = drawn(2, 3), {"gamma": 0.9, "lam": 0.9}
    for bad, message in (
        (torch.ones(3), rf"{name} must be a number or have shape \(2, 3\).* or \(2,\).*\(3,\)"),
        (torch.ones(2, device="meta"), f"{name} must be on .*got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            gae(**inputs, **good | {name: bad}, backend=backend)
    with pytest.raises(TypeError, match=f"{name} must be float32.*int64"):
        gae(**inputs, **good | {name: torch.ones(2).long()}, backend=backend)
    bad = torch.tensor([[0.5] * 3, [0.5, 1.5, 0.5]])
    if bad.is_cuda:
        return
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got 1.5 at \[1, 1\]"):
        gae(**inputs, **good | {name: bad}, backend=backend)


def test_nothing_leaks_from_masked_out_positions(backend):
    inputs = drawn(3, 50)
    out = ~inputs["mask"]
    factors = 0.5 + 0.5 * torch.rand(2, 3, 50, dtype=torch.float64)
    log_rhos = torch.randn(3, 50, dtype=torch.float64)

    def run(inputs, log_rhos):
        gamma, lam = factors
        a = gae(**inputs, gamma=gamma, lam=lam, backend=backend)
        return *a, *vtrace(log_rhos, **inputs, gamma=gamma, backend=backend)

    clean = run(inputs, log_rhos)
    for name in ("rewards", "values"):
        inputs[name] = inputs[name].masked_fill(out, math.nan)
    dirty = run(inputs, log_rhos.masked_fill(out, math.nan))
    for x, y in zip(clean, dirty, strict=True):
        assert x.equal(y)
        assert (x[out] == 0).all()


def vtrace_by_definition(row, log_rhos, gamma, lam, rho_most, c_most, pg_most):
    """v_s = V_s + Σ_t (Π_{s≤i<t} γ c_i) δ_t, the equation (1) of the paper."""
    kept = [t for t in range(len(row["rewards"])) if row["mask"][t]]
    ratio = log_rhos.exp()
    advantages, targets = torch.zeros(2, len(row["rewards"]), dtype=torch.float64)
    for i, t in enumerate(kept):
        total, weight = 0.0, 1.0
        for j in range(i, len(kept)):
            s, (value, goes_on) = kept[j], following(kept, j, row)
            td = row["rewards"][s] + gamma * value - row["values"][s]
            total += weight * ratio[s].clamp(max=rho_most) * td
            weight *= gamma * lam * ratio[s].clamp(max=c_most)
            if not goes_on:
                break
        targets[t] = row["values"][t] + total
    for i, t in enumerate(kept):
        value, goes_on = following(kept, i, row)
        target = targets[kept[i + 1]] if goes_on else value
        td = row["rewards"][t] + gamma * target - row["values"][t]
        advantages[t] = ratio[t].clamp(max=pg_most) * td
    return advantages, targets


@pytest.mark.parametrize(
    "thresholds", ((1.0, 1.0, 1.0), (0.7, 1.3, 2.0), (math.inf, 1.0, math.inf))
)
def test_vtrace_matches_the_paper(backend, thresholds):
    inputs, log_rhos = drawn(4, 20), 0.7 * torch.randn(4, 20, dtype=torch.float64)
    names = ("clip_rho_threshold", "clip_c_threshold", "clip_pg_rho_threshold")
    options = dict(zip(names, thresholds, strict=True))
    result = vtrace(log_rhos, **inputs, gamma=0.9, lam=0.8, **options, backend=backend)
    rows = [
        vtrace_by_definition(row_of(inputs, i), log_rhos[i], 0.9, 0.8, *thresholds)
        for i in range(4)
    ]
    for ours, true in zip(result, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(true), atol=1e-12, rtol=0)


def test_vtrace_by_hand(backend):
    """γ = 1, rewards 1 and 1, V = 0, ratios 2 and 1/2: v_1 = 1/2, v_0 = 1 + 1/2."""
    log_rhos = torch.tensor([[math.log(2.0), math.log(0.5)]])
    result = vtrace(log_rhos, torch.ones(1, 2), torch.zeros(1, 2), gamma=1.0, backend=backend)
    torch.testing.assert_close(result.returns, torch.tensor([[1.5, 0.5]]))
    torch.testing.assert_close(result.advantages, torch.tensor([[1.5, 0.5]]))


def test_vtrace_on_policy_is_gae(backend):
    inputs = drawn(3, 40)
    inputs["dones"] &= inputs["mask"]
    zeros = torch.zeros(3, 40, dtype=torch.float64)
    factors = {"gamma": 0.9 + 0.1 * torch.rand(3, dtype=torch.float64), "lam": 0.8}
    targets = vtrace(zeros, **inputs, **factors, backend=backend).returns
    expected = gae(**inputs, **factors, backend=backend).returns
    torch.testing.assert_close(targets, expected, atol=1e-12, rtol=0)


def test_vtrace_bounds_what_fp32_cannot_hold(backend):
    """e^200 and e^-200, as everywhere: clipped they are the threshold and nearly nothing."""
    log_rhos = torch.tensor([[200.0, -200.0]])
    result = vtrace(log_rhos, torch.ones(1, 2), torch.zeros(1, 2), gamma=0.5, backend=backend)
    torch.testing.assert_close(result.returns, torch.tensor([[1.0, 0.0]]))
    unclipped = vtrace(
        log_rhos,
        torch.ones(1, 2),
        torch.zeros(1, 2),
        gamma=0.5,
        clip_rho_threshold=math.inf,
        backend=backend,
    )
    assert unclipped.returns.isfinite().all()


def test_vtrace_names_bad_arguments(backend):
    inputs, log_rhos = drawn(2, 3), torch.zeros(2, 3)
    good = {"log_rhos": log_rhos, **inputs, "gamma": 0.9}
    for bad, error, message in (
        ({"log_rhos": torch.zeros(2, 4)}, ValueError, r"log_rhos must have shape \(2, 3\)"),
        ({"clip_c_threshold": 0}, ValueError, "clip_c_threshold must be > 0, got 0"),
        ({"gamma": 1.1}, ValueError, "gamma must be <= 1, got 1.1"),
        ({"mask": inputs["mask"].int()}, TypeError, r"mask must be a bool.*take mask\.bool\(\)"),
    ):
        with pytest.raises(error, match=message):
            vtrace(**good | bad, backend=backend)
    if waits_for_nothing(backend) and log_rhos.is_cuda:
        return
    log_rhos[1, 2] = math.nan
    inputs["mask"][1, 2] = True
    with pytest.raises(ValueError, match=r"log_rhos must be finite.*got nan at \[1, 2\]"):
        vtrace(**good, backend=backend)


@pytest.mark.parametrize("name", ("gamma", "lam"))
def test_factors_that_do_not_count_are_not_looked_at(backend, name):
    rewards, values = torch.randn(2, 1, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    factors = {"gamma": 0.9, "lam": 0.8}
    expected = gae(rewards, values, mask, **factors, backend=backend)
    for bad in (math.nan, 7.0):
        own = torch.tensor([[factors[name]] * 2 + [bad]], dtype=torch.float64)
        got = gae(rewards, values, mask, **factors | {name: own}, backend=backend)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)
