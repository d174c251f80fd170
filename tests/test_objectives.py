"""The objectives, each against its paper's formula in loops over sequences and tokens, in fp64."""

import math
from functools import partial

import pytest
import torch

from ppo_kernels import clipped_policy_loss
from ppo_kernels.objectives import (
    AGGREGATIONS,
    OBJECTIVES,
    cispo,
    fixed_length_mean,
    gspo,
    ppo,
    sequence_mean,
    tis,
    token_mean,
)

EPS_LOW, EPS_HIGH = 0.15, 0.3
# What an objective takes besides, and its coefficients here.
OPTIONS = {
    "ppo": {"clip_low": EPS_LOW, "clip_high": EPS_HIGH},
    "dual_clip": {"clip_low": EPS_LOW, "clip_high": EPS_HIGH, "bound": 1.4},
    "dapo": {"clip_low": EPS_LOW, "clip_high": EPS_HIGH},
    "gspo": {"clip_low": 0.02, "clip_high": 0.03},
    "cispo": {"clip_low": EPS_LOW, "clip_high": EPS_HIGH},
    "tis": {"clip_low": EPS_LOW, "clip_high": EPS_HIGH, "cap": 1.2},
}
AVERAGES = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "fixed_length_mean": partial(fixed_length_mean, length=9),
}


def batch(advantages_of="tokens"):
    """Arguments in which every branch is taken; what is masked out is NaN or infinite."""
    torch.manual_seed(3)
    mask = torch.rand(5, 6) < 0.7
    mask[2] = False
    mask[3] = True
    old = -torch.rand(5, 6, dtype=torch.float64)
    logprobs = old + 0.5 * torch.randn(5, 6, dtype=torch.float64)
    rollout = old + 0.5 * torch.randn(5, 6, dtype=torch.float64)
    advantages = torch.randn((5, 6) if advantages_of == "tokens" else (5,), dtype=torch.float64)
    for x, dirt in ((logprobs, math.nan), (old, -math.inf), (rollout, math.inf)):
        x[~mask] = dirt
    return logprobs.requires_grad_(), old, advantages, mask, rollout


def by_hand(name, logprobs, old, advantages, mask, rollout, average, **options):
    """(loss, approx_kl, clip_fraction): the formulas, token by token."""
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    rows = []
    for b in range(5):
        counted = [t for t in range(6) if mask[b, t]]
        row = []
        for t in counted:
            advantage = advantages[b, t] if advantages.ndim == 2 else advantages[b]
            ratio = torch.exp(logprobs[b, t] - old[b, t])
            k3 = ratio.detach() - 1 - ratio.detach().log()
            if name == "gspo":
                mean = sum(logprobs[b, u] - old[b, u] for u in counted) / len(counted)
                own = torch.exp(logprobs[b, t] - logprobs[b, t].detach())
                ratio = torch.exp(mean).detach() * own
            if name == "tis":
                weight = torch.exp(old[b, t] - rollout[b, t]).item()
                advantage = advantage * min(weight, options["cap"])
            bounded = min(max(ratio.item(), low), high)
            clipped = bounded * advantage
            acts = (clipped < ratio * advantage).item()
            objective = clipped if acts else ratio * advantage
            if name == "dual_clip" and advantage < 0:
                objective = torch.maximum(objective, options["bound"] * advantage)
            if name == "cispo":
                objective = bounded * advantage * logprobs[b, t]
                acts = bounded != ratio.item()
            row.append((-objective, k3, torch.tensor(float(acts)).double()))
        rows.append(row)
    tokens, sequences = mask.sum().item(), sum(1 for row in rows if row)
    results = []
    for i in range(3):
        sums = [sum(terms[i] for terms in row) for row in rows if row]
        if average == "token_mean":
            results.append(sum(sums) / tokens)
        elif average == "sequence_mean":
            lengths = [len(row) for row in rows if row]
            means = [x / n for x, n in zip(sums, lengths, strict=True)]
            results.append(sum(means) / sequences)
        else:
            results.append(sum(sums) / (9 * sequences))
    return results


@pytest.mark.parametrize("advantages_of", ("tokens", "sequences"))
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_is_its_formula(name, average, advantages_of):
    logprobs, old, advantages, mask, rollout = batch(advantages_of)
    extra = {"rollout_logprobs": rollout} if name == "tis" else {}
    result = OBJECTIVES[name](
        logprobs, old, advantages, mask, aggregate=AVERAGES[average], **OPTIONS[name], **extra
    )
    (grad,) = torch.autograd.grad(result.loss, logprobs)
    truth = by_hand(name, logprobs, old, advantages, mask, rollout, average, **OPTIONS[name])
    (grad_truth,) = torch.autograd.grad(truth[0], logprobs)
    for mine, true in zip(result, truth, strict=True):
        torch.testing.assert_close(mine.detach(), true.detach(), atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(grad, grad_truth, atol=1e-13, rtol=1e-13)
    assert (grad[~mask] == 0).all() and (grad != 0).any()
    assert 0 < result.clip_fraction < 1
    assert not result.approx_kl.requires_grad


def test_gspo_is_the_sequence_ratio_of_its_paper():
    """GSPO itself, one ratio and one advantage per sequence, through autograd."""
    logprobs, old, advantages, mask, _ = batch("sequences")
    result = gspo(logprobs, old, advantages, mask, clip_low=0.1, clip_high=0.2)
    (grad,) = torch.autograd.grad(result.loss, logprobs)
    objectives = []
    for b in (0, 1, 3, 4):
        moved = logprobs[b][mask[b]].sum() - old[b][mask[b]].sum()
        ratio = torch.exp(moved / mask[b].sum())
        clipped = ratio.clamp(0.9, 1.2)
        objectives.append(torch.minimum(ratio * advantages[b], clipped * advantages[b]))
    truth = -sum(objectives) / 4
    (grad_truth,) = torch.autograd.grad(truth, logprobs)
    torch.testing.assert_close(result.loss, truth, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(grad, grad_truth, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [(2, 1.1, -2.2, -2.2), (2, 1.5, -2.4, 0), (-2, 0.9, 1.8, 1.8), (-2, 0.5, 1.6, 0)],
)
def test_worked_examples_of_clipping(advantage, ratio, loss, gradient):
    """DESIGN §9; one token is a sequence too, so that GSPO with these bounds is the same."""
    for objective in (ppo, gspo, partial(tis, rollout_logprobs=torch.tensor([[-1.0]]).double())):
        old = torch.tensor([[-1.0]], dtype=torch.float64)
        logprobs = (old + math.log(ratio)).requires_grad_()
        advantages = torch.tensor([float(advantage)])
        result = objective(logprobs, old, advantages, clip_low=0.2, clip_high=0.2)
        result.loss.backward()
        assert result.loss.item() == pytest.approx(loss, abs=1e-12)
        assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(
    ("objective", "ratio", "advantage", "gradient"),
    [
        # DAPO's upper clip is 0.28: 1.25 is free, where PPO with 0.2 would drop the token.
        ("dapo", 1.25, 1, -1.25),
        ("dapo", 1.29, 1, 0),
        ("dual_clip", 2.9, -1, 2.9),
        ("dual_clip", 3.1, -1, 0),
        ("gspo", 1.0003, 1, -1.0003),
        ("gspo", 1.0005, 1, 0),
        ("gspo", 0.9996, -1, 0),
        # CISPO keeps every token: the weight is bounded, from above only.
        ("cispo", 7, 1, -5),
        ("cispo", 0.01, -1, 0.01),
    ],
)
def test_coefficients_of_the_papers(objective, ratio, advantage, gradient):
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    OBJECTIVES[objective](logprobs, old, torch.tensor([float(advantage)])).loss.backward()
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(("moved", "weight"), [(math.log(1.7), 1.7), (math.log(2.4), 2.0)])
def test_importance_weights_are_truncated_at_two(moved, weight):
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    logprobs = old.clone().requires_grad_()
    tis(logprobs, old, torch.tensor([3.0]), rollout_logprobs=old - moved).loss.backward()
    assert logprobs.grad.item() == pytest.approx(-3 * weight, abs=1e-12)


def test_ppo_is_the_fused_policy_loss():
    logprobs, old, advantages, mask, _ = batch()
    ours = ppo(logprobs, old, advantages, mask, aggregate=partial(token_mean, denominator=7))
    fused = clipped_policy_loss(logprobs, old, advantages, mask, denominator=7)
    for mine, theirs in zip(ours, fused, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-13, rtol=1e-13)


def test_aggregations_by_hand():
    """Sequences of 1, 3 and no tokens."""
    x = torch.tensor([[6.0, math.nan, math.inf], [1.0, 2.0, 6.0], [math.nan] * 3])
    x.requires_grad_()
    mask = torch.tensor([[True, False, False], [True] * 3, [False] * 3])
    cases = [
        (token_mean(x, mask), 15 / 4, [1 / 4, 1 / 4]),
        (token_mean(x, mask, denominator=10), 1.5, [0.1, 0.1]),
        (sequence_mean(x, mask), (6 + 3) / 2, [1 / 2, 1 / 6]),
        (sequence_mean(x, mask, denominator=torch.tensor(6)), 1.5, [1 / 6, 1 / 18]),
        (fixed_length_mean(x, mask, length=5), 15 / 10, [1 / 10, 1 / 10]),
        (fixed_length_mean(x, mask, length=5, denominator=3), 1.0, [1 / 15, 1 / 15]),
    ]
    for mean, value, (first, second) in cases:
        assert mean.item() == pytest.approx(value, abs=1e-6)
        (grad,) = torch.autograd.grad(mean, x)
        truth = torch.tensor([[first, 0, 0], [second] * 3, [0] * 3])
        torch.testing.assert_close(grad, truth)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_aggregation_may_multiply_by_the_mask(name):
    """Terms that do not count are finite, whatever is there."""
    logprobs, old, advantages, mask, rollout = batch()
    rollout[~mask] = math.nan
    extra = {"rollout_logprobs": rollout} if name == "tis" else {}
    call = partial(OBJECTIVES[name], logprobs, old, advantages, mask, **extra)
    own = call(aggregate=lambda x, mask: (x * mask).sum() / mask.sum())
    for mine, expected in zip(own, call(aggregate=token_mean), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-13, rtol=1e-13)


def test_micro_batches_sum_to_the_whole():
    """With the denominators of the whole batch."""
    logprobs, old, advantages, mask, _ = batch()
    denominators = {"token_mean": mask.sum(), "sequence_mean": 4, "fixed_length_mean": 4}
    for name, aggregate in AVERAGES.items():
        whole = gspo(logprobs, old, advantages, mask, aggregate=aggregate).loss
        part = partial(aggregate, denominator=denominators[name])
        parts = sum(
            gspo(*(x[rows] for x in (logprobs, old, advantages, mask)), aggregate=part).loss
            for rows in (slice(0, 2), slice(2, 5))
        )
        torch.testing.assert_close(parts, whole, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", ((2, 3), (0, 3), (2, 0)))
def test_nothing_that_counts_is_0(name, average, shape):
    logprobs = torch.full(shape, math.nan, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    extra = {"rollout_logprobs": logprobs.detach()} if name == "tis" else {}
    dirty = logprobs.detach(), logprobs.detach(), mask
    result = OBJECTIVES[name](logprobs, *dirty, aggregate=AVERAGES[average], **extra)
    result.loss.backward()
    assert [x.item() for x in result] == [0, 0, 0]
    assert (logprobs.grad == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ratios_that_overflow(name):
    """fp32: a clipped token's gradient is 0, and no other token is touched."""
    old = torch.tensor([[-200.0, -1.0]])
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    extra = {"rollout_logprobs": old - 200} if name == "tis" else {}
    result = OBJECTIVES[name](logprobs, old, torch.ones(1), **extra)
    result.loss.backward()
    assert result.loss.isfinite() and logprobs.grad.isfinite().all()
    # GSPO's ratio is the sequence's; CISPO drops no token.
    expected = {"gspo": [0, 0], "cispo": [-2.5, -0.5], "tis": [0, -1]}.get(name, [0, -0.5])
    torch.testing.assert_close(logprobs.grad, torch.tensor([expected]).float())


@pytest.mark.parametrize("bad", (-math.inf, math.nan))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_counted_logprob_that_is_not_finite_is_named(name, bad):
    logprobs, old, advantages, mask, rollout = batch()
    own = {"rollout_logprobs": rollout} if name == "tis" else {}
    logprobs = logprobs.detach().clone()
    logprobs[3, 4] = bad
    with pytest.raises(ValueError, match=rf"logprobs must be finite.* got {bad} at \[3, 4\]"):
        OBJECTIVES[name](logprobs, old, advantages, mask, **own)


def test_half_precision_is_computed_in_fp32():
    old = torch.tensor([[-1.0, -2.0]]).bfloat16()
    logprobs = (old + 0.125).requires_grad_()
    for objective in (ppo, cispo, gspo):
        result = objective(logprobs, old, torch.ones(1).bfloat16(), clip_low=0.5, clip_high=0.5)
        assert result.loss.dtype == torch.float32
        weight = math.exp(0.125)
        expected = -weight * (logprobs.float().mean().item() if objective is cispo else 1)
        assert result.loss.item() == pytest.approx(expected, rel=1e-6)
        (grad,) = torch.autograd.grad(result.loss, logprobs)
        torch.testing.assert_close(grad.float(), torch.full((1, 2), -weight / 2), rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("ppo", {"logprobs": torch.zeros(3)}, ValueError, r"logprobs must have shape \(B, T\)"),
        ("ppo", {"logprobs": None}, TypeError, "logprobs must be a tensor, got NoneType"),
        ("ppo", {"old_logprobs": torch.zeros(2)}, ValueError, r"old_logprobs must have .*\(2, 3\)"),
        ("gspo", {"advantages": torch.zeros(3)}, ValueError, r"advantages must have.* \(2,\)"),
        ("gspo", {"advantages": torch.zeros(2, 1)}, ValueError, r"advantages must .*\(2, 3\)"),
        ("cispo", {"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor.*float32"),
        ("cispo", {"clip_low": 1.5}, ValueError, "clip_low must be <= 1, got 1.5"),
        ("dapo", {"clip_high": -0.1}, ValueError, "clip_high must be >= 0, got -0.1"),
        ("dual_clip", {"bound": 1.0}, ValueError, "dual_clip must be > 1, got 1.0"),
        ("tis", {"cap": 0}, ValueError, "cap must be > 0, got 0"),
        ("tis", {"rollout_logprobs": None}, TypeError, "rollout_logprobs must be a tensor"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(name, arguments, error, message):
    good = {x: torch.zeros(2, 3) for x in ("logprobs", "old_logprobs", "advantages")}
    if name == "tis":
        good["rollout_logprobs"] = torch.zeros(2, 3)
    with pytest.raises(error, match=message):
        OBJECTIVES[name](**good | arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("sequence_mean", {"x": torch.zeros(3)}, ValueError, r"x must have shape \(B, T\), got"),
        ("token_mean", {"denominator": -1.0}, ValueError, "denominator must be >= 0, got -1.0"),
        ("fixed_length_mean", {"length": 0}, ValueError, "length must be > 0, got 0"),
        ("sequence_mean", {"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_of_aggregations_are_named(name, arguments, error, message):
    good = {"length": 3} if name == "fixed_length_mean" else {}
    with pytest.raises(error, match=message):
        AGGREGATIONS[name](**{"x": torch.zeros(2, 3)} | good | arguments)


def test_weights_of_tis_are_bounded():
    """Without a cap to speak of, a token without advantage has no loss all the same."""
    logprobs = torch.zeros(1, 2, requires_grad=True)
    old, rollout = torch.zeros(1, 2), torch.tensor([[-200.0, -200.0]])
    result = tis(logprobs, old, torch.zeros(1, 2), rollout_logprobs=rollout, cap=1e300)
    result.loss.backward()
    assert result.loss == 0
    assert (logprobs.grad == 0).all()
