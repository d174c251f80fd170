"""Calls one op of each family on a backend, against `reference`: where torch alone is installed.

python tests/installed.py native
"""

import sys

import torch

import ppo_kernels as pk

backend = sys.argv[1]
torch.manual_seed(0)
logits, ref_logits = torch.randn(2, 3, 5, 1031)
tokens, mask = torch.randint(1031, (3, 5)), torch.rand(3, 5) < 0.8
logprobs, values, rewards, advantages = torch.randn(4, 3, 5)
hidden, weight, uniforms = torch.randn(3, 5, 8), torch.randn(1031, 8), torch.rand(3, 5)


def loss_and_gradient(backend):
    x = logits.clone().requires_grad_()
    loss = pk.ppo_loss(x, tokens, logprobs, advantages, mask, backend=backend).loss
    loss.backward()
    return loss.detach(), x.grad


FAMILIES = {
    "logprobs": lambda b: pk.token_logprobs_and_entropy(logits, tokens, backend=b),
    "statistics": lambda b: pk.token_statistics(logits, tokens, backend=b),
    "kl": lambda b: pk.kl_divergence(logits, ref_logits, backend=b),
    "gae": lambda b: pk.gae(rewards, values, mask, gamma=0.99, lam=0.95, backend=b),
    "masked": lambda b: pk.masked_whiten(values, mask, backend=b),
    "ppo_loss": loss_and_gradient,
    "losses of tokens": lambda b: pk.clipped_policy_loss(
        logprobs, values, advantages, mask, backend=b
    ),
    "sampling": lambda b: pk.sample_tokens(logits, uniforms, top_k=9, backend=b),
    "linear": lambda b: pk.linear_token_logprobs(hidden, weight, tokens, backend=b),
}
for family, op in FAMILIES.items():
    torch.testing.assert_close(
        op(backend), op("reference"), msg=lambda text, family=family: f"{family}: {text}"
    )
try:
    pk.token_logprobs(logits, tokens + 1031, backend=backend)
    sys.exit("a token out of range raises no error")
except ValueError as error:
    if "1031" not in str(error):
        raise
superfluous = {"numpy", "transformers", "torch._dynamo"} & sys.modules.keys()
if superfluous:
    sys.exit(f"imported: {superfluous}")
print(f"{len(FAMILIES)} families")
