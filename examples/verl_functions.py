"""The functions of verl's PPO on the ops of ppo_kernels.

Needs verl, which pins other versions of what is installed here: `pip install --no-deps verl==0.9.1`
and `pip install ray hydra-core codetiming peft tensordict orjson`.
"""

import torch
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional as verl_F

from ppo_kernels.integrations import patch

B, T, V = 2, 64, 32_000
logits = torch.randn(B, T, V, requires_grad=True)  # stands for your model's
responses = torch.randint(V, (B, T))
rewards, values = torch.randn(2, B, T)
mask = torch.ones(B, T, dtype=torch.int64)

with patch("verl"):
    advantages, returns = core_algos.compute_gae_advantage_return(
        rewards, values, mask, gamma=1.0, lam=0.95
    )
    log_prob = verl_F.logprobs_from_logits(logits, responses)
    entropy = verl_F.entropy_from_logits(logits)

ratio = torch.exp(log_prob - log_prob.detach())
(-verl_F.masked_mean(ratio * advantages + 0.01 * entropy, mask)).backward()
