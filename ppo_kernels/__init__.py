"""Fused PPO ops: log-probabilities, entropy, KL, advantages and the clipped loss from logits."""

from ppo_kernels import objectives
from ppo_kernels.gae import AdvantagesAndReturns, gae, gae_packed, vtrace
from ppo_kernels.kept import kept_from_mask, kept_token_logprobs_and_entropy
from ppo_kernels.kl import kl_divergence, kl_estimate
from ppo_kernels.linear import (
    linear_ppo_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
)
from ppo_kernels.logprobs import (
    LogprobsAndEntropy,
    check_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
)
from ppo_kernels.masked import masked_mean, masked_whiten
from ppo_kernels.ppo_loss import PPOLoss, ppo_loss, ppo_loss_
from ppo_kernels.sampling import SampledTokens, sample_tokens
from ppo_kernels.statistics import TokenStatistics, token_statistics
from ppo_kernels.token_losses import (
    PolicyLoss,
    ValueLoss,
    clipped_policy_loss,
    value_loss,
)
from ppo_kernels.vocab_parallel import (
    vocab_parallel_kl_divergence,
    vocab_parallel_ppo_loss,
    vocab_parallel_token_logprobs_and_entropy,
)

__version__ = "0.1.0"

__all__ = [
    "AdvantagesAndReturns",
    "LogprobsAndEntropy",
    "PPOLoss",
    "PolicyLoss",
    "SampledTokens",
    "TokenStatistics",
    "ValueLoss",
    "check_logprobs",
    "clipped_policy_loss",
    "gae",
    "gae_packed",
    "kept_from_mask",
    "kept_token_logprobs_and_entropy",
    "kl_divergence",
    "kl_estimate",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "linear_token_logprobs_and_entropy",
    "masked_mean",
    "masked_whiten",
    "objectives",
    "ppo_loss",
    "ppo_loss_",
    "sample_tokens",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "token_statistics",
    "value_loss",
    "vocab_parallel_kl_divergence",
    "vocab_parallel_ppo_loss",
    "vocab_parallel_token_logprobs_and_entropy",
    "vtrace",
]
