"""fp64 anywhere among the floating inputs gives fp64 results, on every backend."""

import math

import pytest
import torch

import ppo_kernels
from ppo_kernels import objectives
from tests.conftest import loss_inputs

WEIGHT = torch.randn(11, 4)


def _loss(op):
    def call(x, backend, group):
        return op(**x, kl_coef=0.1, entropy_coef=0.1, backend=backend)

    return call, {"logits", "old_logprobs", "advantages", "ref_logprobs"}


def _linear(op):
    def call(x, backend, group):
        rest = {k: v for k, v in x.items() if k != "logits"}
        hidden = x["logits"][..., :4]
        return op(hidden, WEIGHT.to(hidden), **rest, kl_coef=0.1, backend=backend)

    return call, {"logits", "old_logprobs", "advantages", "ref_logprobs"}


def _parallel_loss(x, backend, group):
    return ppo_kernels.vocab_parallel_ppo_loss(
        **x, kl_coef=0.1, entropy_coef=0.1, group=group, vocab_start=0, backend=backend
    )


def _per_token(op, *names, **options):
    return lambda x, b, g: op(*(x[name] for name in names), **options, backend=b), set(names)


# f(inputs, backend, group) and the names of its floating inputs.
OPS = {
    "ppo_loss": _loss(ppo_kernels.ppo_loss),
    "ppo_loss_": _loss(ppo_kernels.ppo_loss_),
    "linear_ppo_loss": _linear(ppo_kernels.linear_ppo_loss),
    "vocab_parallel_ppo_loss": (
        _parallel_loss,
        {"logits", "old_logprobs", "advantages", "ref_logprobs"},
    ),
    "clipped_policy_loss": _per_token(
        ppo_kernels.clipped_policy_loss, "ref_logprobs", "old_logprobs", "advantages"
    ),
    "value_loss": _per_token(
        ppo_kernels.value_loss, "ref_logprobs", "old_logprobs", "advantages", clip=0.1
    ),
    "kl_estimate": _per_token(
        ppo_kernels.kl_estimate, "old_logprobs", "ref_logprobs", estimator="k3"
    ),
    "gae": (
        lambda x, b, g: ppo_kernels.gae(
            x["advantages"],
            x["old_logprobs"],
            bootstrap_values=x["ref_logprobs"][:, 0],
            gamma=0.9,
            lam=0.8,
            backend=b,
        ),
        {"advantages", "old_logprobs", "ref_logprobs"},
    ),
    "gae_packed": (
        lambda x, b, g: ppo_kernels.gae_packed(
            x["advantages"].flatten(),
            x["old_logprobs"].flatten(),
            torch.tensor([0, 2, 6]),
            bootstrap_values=x["ref_logprobs"][:, 0],
            gamma=0.9,
            lam=0.8,
            backend=b,
        ),
        {"advantages", "old_logprobs", "ref_logprobs"},
    ),
}


def inputs():
    drawn = loss_inputs(2, 3, 11)
    del drawn["mask"]
    return {k: x.float() if x.is_floating_point() else x for k, x in drawn.items()}


def floats(results):
    results = (results,) if isinstance(results, torch.Tensor) else results
    return [x for x in results if x.is_floating_point()]


@pytest.mark.parametrize("name", OPS)
def test_fp64_anywhere_gives_fp64(backend, name, group_of_one):
    op, names = OPS[name]
    drawn = inputs()
    narrow = floats(op({k: x.clone() for k, x in drawn.items()}, backend, group_of_one))
    assert all(x.dtype == torch.float32 for x in narrow)
    for wide in sorted(names):
        mixed = {k: x.double() if k == wide else x.clone() for k, x in drawn.items()}
        for ours, alike in zip(floats(op(mixed, backend, group_of_one)), narrow, strict=True):
            assert ours.dtype == torch.float64, wide
            torch.testing.assert_close(ours.float(), alike, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_fp64_anywhere_gives_fp64_objectives(name):
    names = ["logprobs", "old_logprobs", "advantages"]
    names += ["rollout_logprobs"] * (name == "tis")
    narrow = dict(zip(names, torch.randn(4, 2, 3), strict=False))
    for wide in names:
        mixed = narrow | {wide: narrow[wide].double()}
        assert all(x.dtype == torch.float64 for x in objectives.OBJECTIVES[name](**mixed)), wide


@pytest.mark.parametrize("name", ("clipped_policy_loss", "value_loss", "kl_estimate", "gae"))
def test_per_token_numbers_are_not_rounded(backend, name):
    """Beside fp32 an fp64 number keeps what fp32 would round away."""
    op, names = OPS[name]
    for wide in sorted(names):
        drawn = inputs()
        drawn[wide] = drawn[wide].double() + 1e-9
        exact = {k: x.double() if x.is_floating_point() else x for k, x in drawn.items()}
        results = zip(
            floats(op(drawn, backend, None)), floats(op(exact, "reference", None)), strict=True
        )
        for ours, truth in results:
            torch.testing.assert_close(ours, truth, atol=1e-13, rtol=1e-12)


def test_gradients_keep_the_dtypes_of_their_inputs(backend):
    drawn = inputs()
    for name in ("ppo_loss", "ppo_loss_"):
        leaf = drawn["logits"].clone().requires_grad_()
        rest = {k: x.double() if x.is_floating_point() else x for k, x in drawn.items()}
        loss = getattr(ppo_kernels, name)(**rest | {"logits": leaf}, backend=backend).loss
        assert loss.dtype == torch.float64
        (grad,) = torch.autograd.grad(loss, leaf)
        assert grad.dtype == torch.float32
    logprobs = drawn["old_logprobs"].clone().requires_grad_()
    loss = ppo_kernels.clipped_policy_loss(
        logprobs, logprobs.detach().double(), drawn["advantages"], backend=backend
    ).loss
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert grad.dtype == torch.float32
    assert math.isclose(grad.sum().item(), -drawn["advantages"].mean().item(), rel_tol=1e-5)
