"""torchrl's functions on our ops, against the formula of advantages with truncations.

`tests/peers` has the real ones, where torchrl is installed.
"""

import pytest
import torch

from ppo_kernels.integrations import torchrl


def gae_truth(gamma, lam, value, next_value, reward, done, terminated):
    """(N, T) by the formula, with differences that autograd sees."""
    advantages, carry = [], torch.zeros_like(value[:, 0])
    for t in reversed(range(value.shape[1])):
        bootstrap = torch.where(terminated[:, t], 0.0, next_value[:, t])
        delta = reward[:, t] + gamma * bootstrap - value[:, t]
        carry = delta + gamma * lam * torch.where(done[:, t], 0.0, carry)
        advantages.insert(0, carry)
    return torch.stack(advantages, 1)


def test_torchrl_truncations_and_gradients():
    inputs = torch.randn(3, 5, 30, dtype=torch.float64)
    done = torch.rand(5, 30) < 0.3
    terminated = done & (torch.rand(5, 30) < 0.5)
    weights = torch.randn(2, 5, 30, dtype=torch.float64)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        advantage, target = function(*leaves)
        loss = (weights[0] * advantage + weights[1] * target).sum()
        return advantage, target, *torch.autograd.grad(loss, leaves)

    def truth(*x):
        advantage = gae_truth(0.97, 0.9, *x, done, terminated)
        return advantage, advantage + x[0]

    expected = run(truth)
    gamma = torch.tensor([0.97], dtype=torch.float64)
    for function in torchrl.REPLACES["torchrl.objectives.value.functional"]:
        results = run(lambda *x, f=function: f(gamma, 0.9, *x, done, terminated, time_dim=-1))
        for x, y in zip(results, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_torchrl_factors_of_each_step_and_their_gradients():
    """A gamma above 1 too, as torchrl takes it."""
    inputs = torch.randn(5, 5, 30, dtype=torch.float64)
    inputs[0], inputs[1] = 0.8 + 0.3 * torch.rand(5, 30), torch.rand(5, 30)
    done = torch.rand(5, 30) < 0.3
    terminated = done & (torch.rand(5, 30) < 0.5)
    weights = torch.randn(5, 30, dtype=torch.float64)

    def truth(gamma, lam, value, next_value, reward):
        advantages, carry = [], torch.zeros_like(value[:, 0])
        for t in reversed(range(30)):
            bootstrap = torch.where(terminated[:, t], 0.0, next_value[:, t])
            delta = reward[:, t] + gamma[:, t] * bootstrap - value[:, t]
            carry = delta + gamma[:, t] * lam[:, t] * torch.where(done[:, t], 0.0, carry)
            advantages.insert(0, carry)
        return torch.stack(advantages, 1)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        advantage = function(*leaves)
        return advantage, *torch.autograd.grad((weights * advantage).sum(), leaves)

    expected = run(truth)
    for function in torchrl.REPLACES["torchrl.objectives.value.functional"]:
        results = run(lambda *x, f=function: f(*x, done, terminated, time_dim=-1)[0])
        for x, y in zip(results, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


def test_torchrl_gradients_of_gradients_in_the_factors():
    lam, *inputs = (torch.rand(2, 6, 1, dtype=torch.float64, requires_grad=True) for _ in range(4))
    done = torch.tensor([[0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]], dtype=torch.bool)[..., None]

    def cubes(lam, *x):
        return torchrl.vec_generalized_advantage_estimate(0.9, lam, *x, done)[0] ** 3

    assert torch.autograd.gradgradcheck(cubes, (lam, *inputs))


def test_torchrl_gradients_of_gradients():
    inputs = [torch.randn(2, 6, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    done = torch.tensor([[0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]], dtype=torch.bool)[..., None]

    def cubes(*x):
        return torchrl.vec_generalized_advantage_estimate(0.9, 0.8, *x, done)[0] ** 3

    assert torch.autograd.gradgradcheck(cubes, inputs)


@pytest.mark.parametrize(
    ("value", "next_value", "reward", "promoted"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32, torch.float64),
    ],
)
def test_torchrl_mixed_dtypes(value, next_value, reward, promoted):
    """torchrl's loop rounds the advantage to the next value's dtype, its default form does not."""
    inputs = [torch.randn(2, 9).to(x) for x in (value, next_value, reward)]
    done = torch.rand(2, 9) < 0.3
    expected = gae_truth(0.9, 0.8, *(x.double() for x in inputs), done, done)
    arguments = 0.9, 0.8, *inputs, done
    result = torchrl.vec_generalized_advantage_estimate(*arguments, time_dim=-1)
    rounded = torchrl.generalized_advantage_estimate(*arguments, time_dim=-1)
    assert [x.dtype for x in result] == 2 * [promoted]
    torch.testing.assert_close(result[0], expected.to(promoted), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(result[1], result[0] + inputs[0])
    assert torch.equal(rounded[0], result[0].to(next_value))
    assert torch.equal(rounded[1], rounded[0] + inputs[0])


def test_torchrl_ends_let_nothing_through():
    """terminated is done when it is not given; NaN and inf behind an end stay there."""
    value, next_value, reward = torch.randn(3, 1, 4, 1)
    done = torch.tensor([0, 1, 0, 1], dtype=torch.bool).reshape(1, 4, 1)
    next_value[0, 1], reward[0, 3] = torch.nan, torch.inf
    advantage, target = torchrl.generalized_advantage_estimate(
        0.9, 0.8, value, next_value, reward, done
    )
    assert advantage[0, :2].isfinite().all() and target[0, :2].isfinite().all()
    torch.testing.assert_close(advantage[0, 1], reward[0, 1] - value[0, 1])
    assert advantage[0, 2:].isinf().all()


@pytest.mark.parametrize("shape", [(4, 0, 1), (0, 4, 1)])
def test_torchrl_without_tokens(shape):
    empty = torch.zeros(shape, requires_grad=True)
    results = torchrl.generalized_advantage_estimate(0.9, 0.9, *3 * [empty], empty.bool())
    assert [x.shape for x in results] == 2 * [shape]
    sum(x.sum() for x in results).backward()
    assert empty.grad.shape == shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reward": torch.zeros(1, 5, 1)}, ValueError, r"must have shape \(1, 5, 1\)"),
        ({"done": torch.zeros(1, 4, 1)}, TypeError, "done.* must be a bool tensor"),
    ],
)
def test_torchrl_errors(change, error, message):
    tensors = {x: torch.zeros(1, 4, 1) for x in ("state_value", "next_state_value", "reward")}
    arguments = {"gamma": 0.9, "lmbda": 0.9, "done": torch.zeros(1, 4, 1).bool(), **tensors}
    with pytest.raises(error, match=message):
        torchrl.generalized_advantage_estimate(**arguments | change)
