"""PPO (Schulman et al., 2017) against a reward model, as in Ouyang et al. (2022).

Four models: the policy that learns, its frozen start as the reference, the reward model, and a
critic that gives the state before each response token a value.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_kernels import gae, masked_mean, masked_whiten, ppo_loss_, value_loss
from rlhf.checkpoint import save_model, start_run
from rlhf.config import PPOConfig
from rlhf.data import load_prompts, tokenize_prompts
from rlhf.errors import UserError
from rlhf.metrics import MetricsLog, plot_metrics
from rlhf.models import (
    autocast,
    check_fits,
    freeze,
    load_causal_lm,
    load_reward_model,
    load_scorer,
    load_tokenizer,
    normalise_scores,
    sequence_scores,
)
from rlhf.optim import clip_gradients, make_optimizer
from rlhf.rollout import (
    Experience,
    Responses,
    decode_responses,
    ended_with_eos,
    evaluate_responses,
    response_logits,
    response_values,
    sample_responses,
    shaped_scores,
    token_rewards,
)

SHOWN = (
    "objective/scores",
    "objective/kl",
    "objective/rlhf_reward",
    "policy/approxkl",
    "policy/entropy",
    "val/explained_variance",
    "tokens/response_len",
    "tokens_per_second",
)
PLOTS = {
    "reward": ("objective/scores", "objective/rlhf_reward", "objective/kl"),
    "policy": ("policy/approxkl", "policy/clipfrac", "policy/entropy"),
    "loss": ("loss/policy", "loss/value", "val/explained_variance"),
    "responses": ("tokens/response_len", "tokens/eos_rate", "tokens_per_second"),
}
STEP_MEANS = (
    "policy/ratio",
    "policy/approxkl",
    "policy/clipfrac",
    "policy/entropy",
    "loss/policy",
    "loss/value",
    "grad_norm/policy",
    "grad_norm/value",
)
NUM_SHOWN_COMPLETIONS = 16


class Batch(NamedTuple):
    """One iteration's responses and what follows from them.

    `ended` (B,): EOS was sampled; `scores` (B,): as they enter `rewards`; the rest (B, T).
    """

    responses: Responses
    experience: Experience
    ended: Tensor
    scores: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


class PPOTrainer:
    """The four models, the optimizer of two of them, and the two halves of an iteration."""

    def __init__(self, config: PPOConfig):
        self.config = config
        self.tokenizer = load_tokenizer(config.model_name_or_path)
        reward_tokenizer = load_tokenizer(config.reward_model_path)
        if self.tokenizer.get_vocab() != reward_tokenizer.get_vocab():
            raise UserError(
                f"{config.model_name_or_path} and {config.reward_model_path} must have the same "
                "tokenizer: train the reward model from the same base model"
            )
        # Dropout stays off in training too, or the first ratio would not be 1.
        self.policy = load_causal_lm(config.model_name_or_path).eval()
        self.reference = freeze(load_causal_lm(config.model_name_or_path))
        self.reward_model = freeze(load_reward_model(config.reward_model_path, self.tokenizer))
        critic_path = config.critic_model_path or config.reward_model_path
        self.critic = load_scorer(critic_path, self.tokenizer).eval()

        self.batch_size = (
            config.per_device_train_batch_size
            * config.gradient_accumulation_steps
            * config.num_mini_batches
        )
        self.num_iterations = math.ceil(config.total_episodes / self.batch_size)
        self.optimizer, self.scheduler = make_optimizer(
            [(self.policy, config.learning_rate), (self.critic, config.critic_learning_rate)],
            config,
            self.num_iterations * config.num_ppo_epochs * config.num_mini_batches,
        )
        self.data_generator = torch.Generator().manual_seed(config.seed)
        self.sampling_generator = torch.Generator(self.policy.device).manual_seed(config.seed)

    def sample(self, prompts: list[list[int]]) -> Responses:
        return sample_responses(
            self.policy, self.tokenizer, prompts, self.config, self.sampling_generator
        )

    def evaluate(self, responses: Responses) -> Batch:
        """What the models say of the responses, the rewards, and the advantages."""
        config, mask = self.config, responses.mask
        experience = evaluate_responses(
            responses,
            policy=self.policy,
            reference=self.reference,
            critic=self.critic,
            reward_model=self.reward_model,
            eos_token_id=self.tokenizer.eos_token_id,
            config=config,
        )
        ended = ended_with_eos(responses, self.tokenizer.eos_token_id)
        scores = shaped_scores(experience.scores, ended, config)
        rewards = token_rewards(
            experience.logprobs, experience.ref_logprobs, scores, mask, config.kl_coef
        )
        advantages, returns = gae(
            rewards, experience.values, mask, gamma=config.gamma, lam=config.lam
        )
        if config.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        return Batch(responses, experience, ended, scores, rewards, advantages, returns)

    @torch.no_grad()
    def score(self, responses: Responses) -> Tensor:
        """Normalised scores of the reward model, (B,)."""
        with autocast(self.config.bf16):
            scores = sequence_scores(
                self.reward_model, responses.input_ids, responses.attention_mask
            )
        return normalise_scores(self.reward_model, scores)

    def update(self, batch: Batch) -> list[dict[str, Tensor]]:
        """`num_ppo_epochs` passes of `num_mini_batches` optimizer steps; the metrics of each step.

        Every term is a sum over the step's tokens divided by their number, so the size of a
        micro-batch changes nothing but memory.
        """
        config, device = self.config, self.policy.device
        steps = []
        for _ in range(config.num_ppo_epochs):
            order = torch.randperm(self.batch_size, generator=self.data_generator).to(device)
            for minibatch in order.chunk(config.num_mini_batches):
                denominator = batch.responses.mask[minibatch].sum()
                stats = defaultdict(float)
                for index, part in batch.responses.by_length(
                    minibatch, config.per_device_train_batch_size
                ):
                    self._backward(batch, index, part, denominator, stats)
                for name, model in (("policy", self.policy), ("value", self.critic)):
                    stats[f"grad_norm/{name}"] = clip_gradients(model, config.max_grad_norm)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                steps.append(stats)
        return steps

    def _backward(
        self,
        batch: Batch,
        index: Tensor,
        part: Responses,
        denominator: Tensor,
        stats: dict[str, Tensor],
    ) -> None:
        """Adds the gradient of a micro-batch, the rows `index` with their responses `part`, and its
        share of the step's metrics."""
        config = self.config
        columns = slice(0, part.tokens.shape[1])
        old_logprobs = batch.experience.logprobs[index, columns]
        with autocast(config.bf16):
            logits = response_logits(
                self.policy, part, self.tokenizer.eos_token_id, config.min_response_length
            )
            values = response_values(self.critic, part)
        policy_loss = ppo_loss_(
            logits,
            part.tokens,
            old_logprobs,
            batch.advantages[index, columns],
            part.mask,
            clip_low=config.cliprange,
            clip_high=config.cliprange_high,
            entropy_coef=config.entropy_coef,
            temperature=config.temperature,
            denominator=denominator,
        )
        critic_loss = value_loss(
            values,
            batch.experience.values[index, columns],
            batch.returns[index, columns],
            part.mask,
            clip=config.cliprange_value,
            denominator=denominator,
        )
        (policy_loss.loss + config.vf_coef * critic_loss.loss).backward()

        ratio = (policy_loss.logprobs - old_logprobs).exp().masked_fill(~part.mask, 1)
        stats["policy/ratio"] += masked_mean(ratio, part.mask, denominator)
        stats["policy/approxkl"] += policy_loss.approx_kl
        stats["policy/clipfrac"] += policy_loss.clip_fraction
        stats["policy/entropy"] += policy_loss.entropy
        stats["loss/policy"] += policy_loss.policy_loss
        stats["loss/value"] += critic_loss.loss.detach()
        stats["policy/ratio_max"] = ratio.max().clamp(min=stats["policy/ratio_max"])
        ratio_error = (ratio - 1).abs().max()
        stats["policy/ratio_error"] = ratio_error.clamp(min=stats["policy/ratio_error"])


def iteration_metrics(batch: Batch, steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """The metrics of an iteration as plain floats: means over its responses, or over its steps.

    `objective/kl` is in nats per response. `policy/first_*` belong to the first minibatch, where
    the policy has not moved yet: the ratio is 1 and approxkl 0, up to rounding.
    """
    mask, experience = batch.responses.mask, batch.experience
    lengths = mask.sum(1).float()
    kl = (experience.logprobs - experience.ref_logprobs).sum(1)
    rlhf_reward = batch.rewards.sum(1)
    returns, values = batch.returns[mask], experience.values[mask]
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
    metrics = {
        "objective/scores": experience.scores.mean(),
        "objective/kl": kl.mean(),
        "objective/kl_per_token": kl.sum() / lengths.sum(),
        "objective/entropy": masked_mean(experience.entropy, mask),
        "objective/rlhf_reward": rlhf_reward.mean(),
        "objective/non_score_reward": rlhf_reward.mean() - batch.scores.mean(),
        "val/explained_variance": 1 - unexplained,
        "tokens/response_len": lengths.mean(),
        "tokens/eos_rate": batch.ended.float().mean(),
        "policy/first_approxkl": steps[0]["policy/approxkl"],
        "policy/first_ratio_error": steps[0]["policy/ratio_error"],
        "policy/ratio_max": torch.stack([step["policy/ratio_max"] for step in steps]).max(),
    }
    for name in STEP_MEANS:
        metrics[name] = torch.stack([step[name] for step in steps]).mean()
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def prompt_batches(
    prompts: list[list[int]], batch_size: int, generator: torch.Generator
) -> Iterator[list[list[int]]]:
    """Batches of prompts without end; all prompts are used before any is used again."""
    queue = []
    while True:
        while len(queue) < batch_size:
            queue += torch.randperm(len(prompts), generator=generator).tolist()
        yield [prompts[i] for i in queue[:batch_size]]
        queue = queue[batch_size:]


def write_completions(trainer: PPOTrainer, texts: list[str], path: Path) -> None:
    """Writes completions of these prompts by the reference and by the policy, with their scores."""
    config, tokenizer = trainer.config, trainer.tokenizer
    prompts = tokenize_prompts(tokenizer, texts, config.max_prompt_length)
    columns = []
    for model in (trainer.reference, trainer.policy):
        generator = torch.Generator(model.device).manual_seed(config.seed)
        responses = sample_responses(model, tokenizer, prompts, config, generator)
        scores = trainer.score(responses).tolist()
        columns.append(list(zip(scores, decode_responses(tokenizer, responses), strict=True)))
    with path.open("w", encoding="utf-8") as file:
        file.write("# Completions before and after PPO\n\n")
        file.write("In brackets the normalised score of the reward model.\n")
        for text, (score_before, before), (score_after, after) in zip(texts, *columns, strict=True):
            file.write(f"\n## {text.strip() or '(empty prompt)'}\n\n")
            file.write(f"- before [{score_before:+.2f}]: {before.strip()}\n")
            file.write(f"- after [{score_after:+.2f}]: {after.strip()}\n")


def train_ppo(config: PPOConfig) -> dict[str, float]:
    """Trains a policy and saves it, with its critic in the subfolder `critic`; returns the metrics
    of the last iteration."""
    start_time = time.perf_counter()
    torch.manual_seed(config.seed)
    texts = load_prompts(config.dataset_name)
    trainer = PPOTrainer(config)
    prompts = tokenize_prompts(trainer.tokenizer, texts, config.max_prompt_length)
    longest = max(len(prompt) for prompt in prompts) + config.response_length
    for model in (trainer.policy, trainer.reward_model, trainer.critic):
        check_fits(model, trainer.tokenizer, longest, "lower max_prompt_length or response_length")
    output_dir = start_run(config, "ppo")
    total = trainer.num_iterations
    batches = prompt_batches(prompts, trainer.batch_size, trainer.data_generator)

    with MetricsLog(output_dir, "ppo", total, config.report_to, SHOWN) as log:
        for iteration, prompt_batch in zip(range(1, total + 1), batches, strict=False):
            start = time.perf_counter()
            responses = trainer.sample(prompt_batch)
            sampled = time.perf_counter()
            batch = trainer.evaluate(responses)
            evaluated = time.perf_counter()
            learning_rate = trainer.scheduler.get_last_lr()[0]
            steps = trainer.update(batch)
            log.advance()
            if iteration % config.logging_steps == 0 or iteration == total:
                metrics = iteration_metrics(batch, steps)
                end = time.perf_counter()
                metrics |= {
                    "time/generate": sampled - start,
                    "time/evaluate": evaluated - sampled,
                    "time/update": end - evaluated,
                    "tokens_per_second": int(responses.mask.sum()) / (end - start),
                    "kl_coef": config.kl_coef,
                    "lr": learning_rate,
                    "episodes": iteration * trainer.batch_size,
                }
                log.write(iteration, metrics)

    save_model(output_dir / "critic", trainer.critic, trainer.tokenizer)
    save_model(output_dir, trainer.policy, trainer.tokenizer)
    write_completions(trainer, texts[:NUM_SHOWN_COMPLETIONS], output_dir / "completions.md")
    plot_metrics(output_dir, PLOTS)
    return metrics | {"iterations": total, "seconds": time.perf_counter() - start_time}
