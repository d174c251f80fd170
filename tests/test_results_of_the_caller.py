"""Results are the caller's: writing to them changes no gradient and makes no backward raise."""

import pytest
import torch

import ppo_kernels
from tests.conftest import loss_inputs

TOKENS = torch.tensor([1, 2, 3])


def _loss(op, x, **options):
    n = x.shape[0]
    rest = torch.full((n,), -1.5), torch.linspace(-1, 1, n)
    options |= {"entropy_coef": 0.1, "kl_coef": 0.1, "ref_logprobs": torch.full((n,), -1.0)}
    return op(x, TOKENS.to(x.device), *rest, **options)


def _weight(x):
    return torch.arange(7.0 * x.shape[1]).view(7, -1).cos().to(x.dtype)


def _linear_loss(x, **options):
    def op(hidden, *rest, **options):
        return ppo_kernels.linear_ppo_loss(hidden, _weight(hidden), *rest, **options)

    return _loss(op, x, **options)


def _kept(x):
    ids = torch.arange(5).repeat(3)
    return ppo_kernels.kept_token_logprobs_and_entropy(x, TOKENS, ids, torch.arange(0, 20, 5))


# Of logits or hidden states (3, 7), with the backend and a process group where they take them.
OPS = {
    "token_logprobs": lambda x, b, g: ppo_kernels.token_logprobs(x, TOKENS, backend=b),
    "token_logprobs_and_entropy": lambda x, b, g: ppo_kernels.token_logprobs_and_entropy(
        x, TOKENS, backend=b
    ),
    "kl_divergence": lambda x, b, g: ppo_kernels.kl_divergence(x, x.detach().flip(-1), backend=b),
    "kl_estimate": lambda x, b, g: ppo_kernels.kl_estimate(
        x, x.detach().flip(-1), estimator="k3", backend=b
    ),
    "ppo_loss": lambda x, b, g: _loss(ppo_kernels.ppo_loss, x, backend=b),
    "ppo_loss_": lambda x, b, g: _loss(ppo_kernels.ppo_loss_, x * 1, backend=b),
    "linear_ppo_loss": lambda x, b, g: _linear_loss(x, backend=b),
    "linear_token_logprobs": lambda x, b, g: ppo_kernels.linear_token_logprobs_and_entropy(
        x, _weight(x), TOKENS, softcap=3.0, backend=b
    ),
    "kept": lambda x, b, g: _kept(x),
    "vocab_parallel_scores": lambda x, b, g: ppo_kernels.vocab_parallel_token_logprobs_and_entropy(
        x, TOKENS, group=g, vocab_start=0, backend=b
    ),
    "vocab_parallel_kl": lambda x, b, g: ppo_kernels.vocab_parallel_kl_divergence(
        x, x.detach().flip(-1), group=g, backend=b
    ),
    "vocab_parallel_ppo_loss": lambda x, b, g: _loss(
        ppo_kernels.vocab_parallel_ppo_loss, x, group=g, vocab_start=0, backend=b
    ),
    "clipped_policy_loss": lambda x, b, g: ppo_kernels.clipped_policy_loss(
        x, x.detach() - 0.1, x.detach().cos(), backend=b
    ),
    "value_loss": lambda x, b, g: ppo_kernels.value_loss(
        x, x.detach() - 0.1, x.detach().cos(), clip=0.2, backend=b
    ),
    "masked_mean": lambda x, b, g: ppo_kernels.masked_mean(x, backend=b),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16), ids=str)
@pytest.mark.parametrize("name", OPS)
def test_what_is_written_to_results_changes_nothing(backend, name, dtype, group_of_one):
    x, grads = torch.randn(3, 7).to(dtype), []
    for writes in (False, True):
        leaf = x.clone().requires_grad_()
        results = OPS[name](leaf, backend, group_of_one)
        results = (results,) if isinstance(results, torch.Tensor) else results
        loss = sum(result.sum() for result in results if result.requires_grad)
        if writes:
            for result in results:
                result.detach().mul_(1.44).add_(3)
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert (grads[0] != 0).any()


def test_the_token_entropy_through_numpy(backend):
    """Which no version counter sees."""
    inputs = loss_inputs(2, 3, 11)
    inputs["logits"].requires_grad_()
    grads = []
    for factor in (1.0, 1.44):
        result = ppo_kernels.ppo_loss(**inputs, entropy_coef=0.5, backend=backend)
        result.token_entropy.cpu().numpy()[...] *= factor
        grads.append(torch.autograd.grad(result.loss, inputs["logits"])[0])
    assert torch.equal(*grads)
