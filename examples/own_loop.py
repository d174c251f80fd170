"""One PPO step in a training loop of your own: rollout, advantages, loss, gradient.

`python examples/own_loop.py` prints loss, approximate KL, clip fraction and entropy.
"""

import torch

from ppo_kernels import gae, masked_whiten, ppo_loss_, token_logprobs_and_entropy

B, T, V = 4, 128, 32_000
ids, mask = torch.randint(V, (B, T + 1)), torch.ones(B, T, dtype=torch.bool)
rewards, values = torch.randn(2, B, T)
head = torch.nn.Linear(64, V)  # stands for your model
hidden = torch.randn(B, T + 1, 64)

# Rollout: log-probs and entropy of the sampled tokens, in one sweep.
with torch.no_grad():
    old_logprobs, entropy = token_logprobs_and_entropy(head(hidden)[:, :-1], ids[:, 1:])

# Advantages: padding, tool output and other gaps are skipped, not broken at.
advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
advantages = masked_whiten(advantages, mask)

# Update: the complete PPO loss from logits; its gradient takes the place of the logits.
loss = ppo_loss_(
    head(hidden[:, :-1]),
    ids[:, 1:],
    old_logprobs,
    advantages,
    mask,
    clip_low=0.2,
    clip_high=0.2,
    entropy_coef=0.01,
    kl_coef=0.05,
    ref_logprobs=old_logprobs,
)
loss.loss.backward()
print(loss.loss, loss.approx_kl, loss.clip_fraction, loss.entropy)
