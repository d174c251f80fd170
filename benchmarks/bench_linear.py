"""The PPO loss and its gradients from hidden states, against its three matrix products alone.

`copied` is a tensor of the logits, which the op never has. The gradients that it returns are
memory that nobody can spare: `memory_without_gradients` leaves them out.
"""

import functools

import torch

from benchmarks.harness import Contest, check_accuracy, check_agreement, checked
from ppo_kernels import linear_ppo_loss, ppo_loss, reference

ENTROPY_COEF = 0.01
# Each takes seconds on a CPU.
ROUNDS = 5


def eager_loss(hidden, weight, *arguments, **options):
    logits = reference.linear_logits(hidden, weight)
    return ppo_loss(logits, *arguments, **options, backend="reference")


compiled_loss = torch.compile(eager_loss, dynamic=False)


def gradients(function, hidden, weight, *arguments, **options):
    """The loss, the per-token results and the gradients in hidden states and weight."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss, *_, logprobs, entropy = function(
        *leaves, *arguments, entropy_coef=ENTROPY_COEF, **options
    )
    return loss.detach(), logprobs, entropy, *torch.autograd.grad(loss, leaves)


def make_linear(shape, dtype, setting):
    n, channels, vocabulary = shape
    device = setting.device
    hidden = torch.randn(n, channels, device=device).to(dtype)
    weight = (torch.randn(vocabulary, channels, device=device) * 2 / channels**0.5).to(dtype)
    tokens = torch.randint(vocabulary, (n,), device=device)
    logits = hidden @ weight.T
    old_logprobs = reference.token_logprobs_and_entropy(logits, tokens)[0]
    old_logprobs += 0.1 * torch.randn_like(old_logprobs)
    advantages = torch.randn_like(old_logprobs)
    inputs = hidden, weight, tokens, old_logprobs, advantages
    products = torch.empty_like(hidden), torch.empty_like(weight)

    def matmuls():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=products[0])
        torch.mm(logits.T, hidden, out=products[1])

    functions = {"eager": eager_loss, "compile": compiled_loss}
    functions = {name: functools.partial(gradients, f, *inputs) for name, f in functions.items()}
    op = functools.partial(gradients, linear_ppo_loss, *inputs, backend=setting.backend)

    def check():
        """Some tokens against fp64, all against eager PyTorch."""
        some = checked(hidden), weight, *(checked(x) for x in inputs[2:])
        got = gradients(linear_ppo_loss, *some, backend=setting.backend)
        eager = gradients(eager_loss, *some)
        truth = gradients(eager_loss, *(x.double() if x.is_floating_point() else x for x in some))
        names = ("loss", "logprobs", "entropy", "grad_hidden", "grad_weight")
        for name, x, *expected in zip(names, got, eager, truth, strict=True):
            check_accuracy(name, x, *expected, fp32_roundings=16)
        for baseline in functions.values():
            for x, y in zip(baseline(), op(), strict=True):
                check_agreement(x, y)

    return Contest(
        op=op,
        baselines=functions | {"matmuls": matmuls},
        copied=logits,
        moved_bytes=2 * (hidden.nbytes + weight.nbytes),
        check=check,
        rounds=ROUNDS,
    )


def test_linear_ppo_loss(measure, benchmark, linear_shape):
    measure("linear_ppo_loss", make_linear, linear_shape, torch.float32)
    info, (n, channels, vocabulary) = benchmark.extra_info, linear_shape
    if "memory" in info:
        returned = (n + vocabulary) * channels / (n * vocabulary)
        info["memory_without_gradients"] = info["memory"] - returned
