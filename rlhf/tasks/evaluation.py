"""Measuring a policy before and after PPO, on prompts that no stage has seen."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kernels import kl_divergence
from rlhf.config import PPOConfig
from rlhf.data import tokenize_prompts
from rlhf.generation import Stopping
from rlhf.models import freeze, load_causal_lm, load_tokenizer
from rlhf.rollout import Draws, Responses, decode_responses, response_logits, sample_responses


class Sampler:
    """A saved policy that answers prompts under the sampling settings of a PPO configuration."""

    def __init__(self, path: Path, config: PPOConfig, seed: int):
        self.config = config
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(path))
        self.policy: PreTrainedModel = freeze(load_causal_lm(str(path)))
        self.stopping = Stopping(self.tokenizer, config)
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, prompts: list[str]) -> Responses:
        ids = tokenize_prompts(self.tokenizer, prompts, self.config.max_prompt_length)
        draws = Draws.of(len(ids), self.config, self.generator)
        return sample_responses(self.policy, self.tokenizer, self.stopping, ids, draws, self.config)

    def complete(self, prompts: list[str]) -> list[str]:
        """A response to each prompt, as text."""
        return decode_responses(self.tokenizer, self.sample(prompts))

    @torch.no_grad()
    def kl(self, reference: "Sampler", responses: Responses) -> float:
        """KL(policy || reference) in nats per sequence: the exact divergence of the next-token
        distributions, summed over each of the policy's own responses, mean over responses."""
        total = 0.0
        rows = torch.arange(len(responses.tokens), device=responses.tokens.device)
        for _, part in responses.by_length(rows, self.config.per_device_eval_batch_size):
            logits, ref_logits = (
                response_logits(sampler.policy, part, self.stopping)
                for sampler in (self, reference)
            )
            kl = kl_divergence(logits, ref_logits, temperature=self.config.temperature)
            total += kl[part.mask].sum().item()
        return total / len(rows)


def compare(
    before: Sampler, after: Sampler, prompts: list[str]
) -> tuple[list[str], list[str], float]:
    """Whole texts (prompt and response) of both policies, and the KL of the second to the first."""
    responses = after.sample(prompts)
    answers = (before.complete(prompts), decode_responses(after.tokenizer, responses))
    texts = [[p + a for p, a in zip(prompts, part, strict=True)] for part in answers]
    return *texts, after.kl(before, responses)
