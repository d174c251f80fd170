"""Losses of a large vocabulary from hidden states: no pass holds the logits of all tokens.

`python examples/large_vocabulary.py` prints two losses. The vocabulary is that of Llama 3, whose
logits of these tokens would take 250 MiB; a chunk of them takes at most 96 MiB on a CPU.
"""

import torch

from ppo_kernels import linear_ppo_loss, linear_token_logprobs, objectives

B, T, D, V = 8, 64, 64, 128_256
hidden = torch.randn(B, T, D, requires_grad=True)  # the last hidden states of your model
head = torch.nn.Linear(D, V, bias=False)
tokens, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)

with torch.no_grad():
    old_logprobs = linear_token_logprobs(hidden, head.weight, tokens)

# The gradients of hidden states and head are made in the forward, in three matrix products.
loss = linear_ppo_loss(hidden, head.weight, tokens, old_logprobs, torch.randn(B, T), mask)
loss.loss.backward()

# Any other objective: log-probs that differentiate, and [B, T] arithmetic.
logprobs = linear_token_logprobs(hidden, head.weight, tokens)
gspo = objectives.gspo(logprobs, old_logprobs, torch.randn(B), mask)
gspo.loss.backward()
print(loss.loss, gspo.loss)
