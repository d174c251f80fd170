"""What PPO holds while it trains: the models, the optimizer of two of them, the two halves of an
iteration, and the state of a run.

Every rank holds the prompts, responses, rewards and advantages of a whole iteration; only the
passes through the models are divided. So what is a mean over an iteration is one over all ranks.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ppo_kernels import masked_mean, value_loss
from rlhf import distributed
from rlhf.config.ppo import PPOConfig
from rlhf.data.loaders import Prompts, load_prompts
from rlhf.data.padding import pad
from rlhf.errors import UserError
from rlhf.models.generation import Stopping
from rlhf.models.heads import ActorCritic, make_head
from rlhf.models.loading import load_causal_lm, load_scorer, load_tokenizer, value_head
from rlhf.models.passes import (
    autocast,
    check_fits,
    checkpointed,
    enable_gradient_checkpointing,
    freeze,
)
from rlhf.models.proof import prove_policy, prove_scorer
from rlhf.models.truncation import KeptIds, make_filters
from rlhf.optim import clip_gradients, make_optimizer, resume_schedule
from rlhf.ppo.adaptive import KLController, ScoreScaler
from rlhf.ppo.advantages import estimate_advantages
from rlhf.ppo.metrics import Batch
from rlhf.rewards.loading import check_rewards, critic_path, load_rewards
from rlhf.rewards.scoring import Samples, Scores, score_samples
from rlhf.rollout import (
    Draws,
    Experience,
    Responses,
    evaluate_responses,
    sample_responses,
    shaped_scores,
    token_rewards,
)
from rlhf.run.state import hash_data, hash_weights
from rlhf.run.terminal import say


class PPOTrainer:
    """The models, their optimizer, and the steps of an iteration.

    Args:
        config: of the run.
        reward_funcs: folders, modules and functions in place of `config.reward_funcs`.
    """

    def __init__(
        self,
        config: PPOConfig,
        reward_funcs: Sequence[str | nn.Module | Callable] | None = None,
    ):
        self.config = config
        self.batch_size = config.responses_per_iteration(distributed.world_size())
        self.iteration = self.episodes = 0  # done
        self.steps_per_iteration = config.num_ppo_epochs * config.num_mini_batches
        if config.adaptive_kl != "none" and self.batch_size >= 5 * config.kl_horizon:
            raise UserError(
                f"kl_horizon {config.kl_horizon} must be more than a fifth of the "
                f"{self.batch_size} responses of an iteration: kl_coef could become negative"
            )

        path = config.model_name_or_path
        self.tokenizer = load_tokenizer(path, config, config.revision)
        self.prompts = load_prompts(
            config, config.dataset_name, config.dataset_split, self.tokenizer
        )
        self.eval_prompts = None
        if config.eval_dataset_name is not None:
            self.eval_prompts = load_prompts(
                config, config.eval_dataset_name, config.eval_dataset_split, self.tokenizer
            )

        self.rewards = load_rewards(config, self.tokenizer, reward_funcs)
        # Dropout stays off in training too, or the first ratio would not be 1.
        self.policy = load_causal_lm(path, config, revision=config.revision).eval()
        self.decoding = prove_policy(self.policy, path)
        self.reference = freeze(copy.deepcopy(self.policy))
        self.stopping = Stopping(self.tokenizer, config, self.policy.generation_config)
        say(self.stopping.describe())
        head = make_head(
            config.logits_from, self.policy, self.stopping, filtered=bool(make_filters(config))
        )
        self.model = ActorCritic(self.policy, self._load_critic(), head).eval()
        self._check_lengths()
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.policy)
            enable_gradient_checkpointing(self.model.critic)

        self.policy_parameters = list(self.policy.parameters())
        self.critic_parameters = self.model.critic_parameters()
        self.optimizer, self.scheduler = make_optimizer(
            [
                (self.policy_parameters, config.learning_rate),
                (self.critic_parameters, config.critic_learning_rate),
            ],
            config,
            self.num_iterations * self.steps_per_iteration,
        )
        self.kl_controller = KLController(config)
        self.score_scaler = ScoreScaler(config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.queue: list[int] = []

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run: those done, and as many as the other episodes take."""
        return self.iteration - (self.episodes - self.config.total_episodes) // self.batch_size

    @cached_property
    def parallel(self) -> nn.Module:
        """The model as passes with gradient go through it, all processes together."""
        return DistributedDataParallel(self.model) if distributed.world_size() > 1 else self.model

    def _load_critic(self) -> PreTrainedModel:
        if self.config.share_trunk:
            return value_head(self.policy)
        path = self.config.critic_model_path or critic_path(self.rewards)
        revision = None if path else self.config.revision
        path = path or self.config.model_name_or_path
        critic = load_scorer(path, self.tokenizer, self.config, revision)
        prove_scorer(critic, path)
        return critic

    def _check_lengths(self) -> None:
        data = [self.prompts, self.eval_prompts] if self.eval_prompts else [self.prompts]
        longest = max(len(ids) for prompts in data for ids in prompts.ids)
        longest += self.config.response_length
        for model in (self.policy, self.model.critic):
            remedy = "lower max_prompt_length or response_length"
            check_fits(model, self.tokenizer, longest, remedy)
        for prompts in data:
            check_rewards(self.rewards, prompts, longest)

    def next_rows(self) -> list[int]:
        """The prompts of the next iteration: all are used before any is used again."""
        while len(self.queue) < self.batch_size:
            count = len(self.prompts.ids)
            self.queue += torch.randperm(count, generator=self.generator).tolist()
        rows, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return rows

    def sample(self, prompts: Prompts, rows: list[int], generator: torch.Generator) -> Responses:
        """Responses of the policy to these rows of `prompts`, the number of which the number of
        processes divides."""
        ids = [prompts.ids[row] for row in rows]
        mine = distributed.my_rows(len(rows))
        draws = Draws.of(len(rows), self.config, generator).rows(mine)
        part = distributed.together(
            lambda: sample_responses(
                self.policy,
                self.stopping,
                self.decoding,
                ids[mine],
                draws,
                self.config,
                keeps_ids=True,
            )
        )
        padded = pad(ids, self.tokenizer.pad_token_id, "left")
        return Responses(
            *(x.to(self.policy.device) for x in padded),
            *(distributed.gather_rows(x) for x in part[2:5]),
            self._gather_kept(part.kept),
        )

    def _gather_kept(self, kept: list[KeptIds] | None) -> list[KeptIds] | None:
        if kept is None:
            return None
        on_cpu = [KeptIds(*(x.cpu() for x in row)) for row in kept]
        rows = chain.from_iterable(distributed.gather_objects(on_cpu))
        return [KeptIds(*(x.to(self.policy.device) for x in row)) for row in rows]

    def observe(
        self, prompts: Prompts, rows: list[int], responses: Responses
    ) -> tuple[Experience, Scores]:
        """What the models and the reward functions say of the responses."""
        experience = evaluate_responses(self.model, self.reference, responses, self.config)
        mine = distributed.my_rows(len(rows))
        samples = self.samples(prompts, rows[mine], responses.rows(mine))
        scores = distributed.together(lambda: score_samples(self.rewards, samples))
        return experience, scores.apply(distributed.gather_rows)

    def samples(self, prompts: Prompts, rows: list[int], responses: Responses) -> Samples:
        """The responses to these rows of `prompts` as reward functions see them."""
        return Samples.of(self.tokenizer, prompts.rows(rows), responses)

    def evaluate(self, rows: list[int], responses: Responses) -> Batch:
        """The rewards and the advantages of the responses to these rows of the prompts."""
        config, mask = self.config, responses.mask
        experience, scores = self.observe(self.prompts, rows, responses)
        shaped = shaped_scores(self.score_scaler(scores.scores), responses.ended, config)
        rewards = scores.token_scores + token_rewards(
            experience.logprobs,
            experience.ref_logprobs,
            shaped,
            mask,
            self.kl_controller.kl_coef,
            config.kl_estimator,
        )
        advantages, returns = estimate_advantages(rewards, experience.values, mask, config)
        return Batch(responses, experience, scores, shaped, rewards, advantages, returns)

    def update(self, batch: Batch) -> list[dict[str, Tensor]]:
        """`num_ppo_epochs` passes of `num_mini_batches` optimizer steps, which end the iteration;
        returns the metrics of each.

        Every term is a sum over the step's tokens divided by their number, so neither the size of a
        micro-batch nor the number of processes changes anything but memory and time. A minibatch
        that is beyond early_stop_kl is the last, and takes no step; the learning rate goes on as
        if it had not stopped.
        """
        limit, steps, taken = self.config.early_stop_kl, [], 0
        with checkpointed(self.model):
            for minibatch in self._minibatches():
                stats = self._gradient(batch, minibatch)
                steps.append(stats)
                if limit is not None and stats["policy/approxkl"] > limit:
                    self.optimizer.zero_grad()
                    break
                self._step(stats)
                taken += 1
        for _ in range(self.steps_per_iteration - taken):
            self.scheduler.step()
        experience = batch.experience
        kl = experience.logprobs - experience.ref_logprobs
        self.kl_controller.update(kl, batch.responses.mask)
        self.iteration += 1
        self.episodes += self.batch_size
        return steps

    def _minibatches(self) -> Iterator[Tensor]:
        for _ in range(self.config.num_ppo_epochs):
            order = torch.randperm(self.batch_size, generator=self.generator)
            yield from order.to(self.policy.device).chunk(self.config.num_mini_batches)

    def _gradient(self, batch: Batch, minibatch: Tensor) -> dict[str, Tensor]:
        """Computes the gradient of a minibatch, each rank that of its share of the micro-batches,
        which are the same for any number of processes; returns the minibatch's metrics."""
        # DistributedDataParallel takes the mean over ranks: of sums over a W-th of the tokens.
        denominator = batch.responses.mask[minibatch].sum() / distributed.world_size()
        size = self.config.per_device_train_batch_size
        parts = list(distributed.my_share(batch.responses.by_length(minibatch, size)))
        means, maxima = defaultdict(float), {}
        for number, (index, part) in enumerate(parts, 1):
            last = number == len(parts) or self.parallel is self.model
            with nullcontext() if last else self.parallel.no_sync():
                self._backward(batch, index, part, denominator, means, maxima)
        return distributed.mean_of(means) | distributed.maximum_of(maxima)

    def _backward(
        self,
        batch: Batch,
        index: Tensor,
        part: Responses,
        denominator: Tensor,
        means: dict[str, Tensor],
        maxima: dict[str, Tensor],
    ) -> None:
        """Adds the gradient of a micro-batch, the rows `index` with their responses `part`, and its
        share of the minibatch's metrics."""
        config = self.config
        columns = slice(0, part.tokens.shape[1])
        old_logprobs = batch.experience.logprobs[index, columns]
        with autocast(config.bf16):
            tokens, values = self.parallel(*part.inputs)
            try:
                policy_loss = part.drawn_from(tokens).ppo_loss(
                    part.tokens,
                    old_logprobs,
                    batch.advantages[index, columns],
                    part.mask,
                    clip_low=config.cliprange,
                    clip_high=config.cliprange_high,
                    dual_clip=config.dual_clip,
                    entropy_coef=config.entropy_coef,
                    temperature=config.temperature,
                    denominator=denominator,
                )
            except ValueError as error:  # of the logits, that is of the weights
                raise UserError(f"training diverged, {error}: lower learning_rate") from error
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
        means["policy/ratio"] += masked_mean(ratio, part.mask, denominator)
        means["policy/approxkl"] += policy_loss.approx_kl
        means["policy/clipfrac"] += policy_loss.clip_fraction
        means["policy/entropy"] += policy_loss.entropy
        means["loss/policy"] += policy_loss.policy_loss
        means["loss/value"] += critic_loss.loss.detach()
        for name, value in (
            ("policy/ratio_max", ratio.max()),
            ("policy/ratio_error", (ratio - 1).abs().max()),
        ):
            maxima[name] = torch.maximum(value, maxima.get(name, value))

    def _step(self, stats: dict[str, Tensor]) -> None:
        """Takes an optimizer step, and notes the norms of the gradients."""
        if self.iteration < self.config.critic_warmup:
            for parameter in self.policy_parameters:
                parameter.grad = None
        for name, parameters in (
            ("policy", self.policy_parameters),
            ("value", self.critic_parameters),
        ):
            stats[f"grad_norm/{name}"] = clip_gradients(parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def inputs(self) -> dict[str, str]:
        """Hashes of the data with all its columns, and of the models that no checkpoint holds; the
        source code of reward functions is not watched."""
        data = {"dataset_name": self.prompts, "eval_dataset_name": self.eval_prompts}
        hashes = {
            name: hash_data(
                chain(prompts.ids, prompts.prompts, prompts.columns, *prompts.columns.values())
            )
            for name, prompts in data.items()
            if prompts is not None
        }
        hashes["model_name_or_path"] = hash_weights([self.reference])
        models = (
            getattr(reward, "model", getattr(reward, "module", None)) for reward in self.rewards
        )
        hashes["reward_funcs"] = hash_weights(model for model in models if model is not None)
        return hashes

    def state_dict(self) -> dict:
        """All that changes during a run, besides the weights."""
        return {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "queue": list(self.queue),
            "generator": self.generator.get_state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "kl_controller": self.kl_controller.state_dict(),
            "score_scaler": self.score_scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        self.queue = state["queue"]
        self.generator.set_state(state["generator"])
        for name in ("optimizer", "kl_controller", "score_scaler"):
            getattr(self, name).load_state_dict(state[name])
        if self.num_iterations < self.iteration:
            raise UserError(
                f"total_episodes {self.config.total_episodes} is less than the {self.episodes} "
                "that the checkpoint has behind it: give at least as many"
            )
        steps_left = (self.num_iterations - self.iteration) * self.steps_per_iteration
        self.scheduler = resume_schedule(
            self.optimizer,
            self.config,
            state["scheduler"]["last_epoch"] + steps_left,
            state["scheduler"],
        )
