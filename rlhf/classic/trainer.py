"""`PPOTrainer.step`: one PPO update from queries, responses and their scores."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, set_seed

from ppo_kernels import (
    gae,
    kl_divergence,
    kl_estimate,
    masked_mean,
    ppo_loss_,
    token_logprobs,
    value_loss,
)
from rlhf import distributed
from rlhf.classic import checks
from rlhf.classic.accelerator import Accelerator
from rlhf.classic.adaptive import AdaptiveKLController, FixedKLController, RunningMoments
from rlhf.classic.batch import Batch, padded, whiten
from rlhf.classic.config import KL_ESTIMATORS, PPOConfig
from rlhf.classic.generation import check_arguments, generate_rows, set_temperature
from rlhf.classic.logs import make_tracker
from rlhf.classic.model import AutoModelForCausalLMWithValueHead, create_reference_model
from rlhf.classic.stats import describe_minibatch, describe_step, deviation
from rlhf.errors import UserError
from rlhf.models.passes import checkpointed, default_device, enable_gradient_checkpointing, freeze
from rlhf.run.state import save_model

COLUMNS = ("input_ids", "attention_mask", "label", "query", "response")


class PPOTrainer:
    """PPO on a model whose trunk carries both the policy and the value head.

    Args:
        config: of the run.
        model: what is trained. It is moved to the GPU if there is one.
        ref_model: the reference of the KL penalty (default: a frozen copy of the model).
        tokenizer: is saved with the model; it must have an EOS token.
        dataset: a torch or datasets Dataset, from which `dataloader` takes shuffled whole batches.
        optimizer: default Adam at config.learning_rate on the parameters that require a gradient.
        data_collator: of the dataloader.
        num_shared_layers: see `create_reference_model`; without `ref_model` only.
        lr_scheduler: stepped once in each `step`.
    """

    is_distributed = False

    def __init__(
        self,
        config: PPOConfig,
        model: AutoModelForCausalLMWithValueHead,
        ref_model: AutoModelForCausalLMWithValueHead | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Dataset | datasets.Dataset | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ):
        checks.instance("config", config, PPOConfig)
        checks.instance("model", model, AutoModelForCausalLMWithValueHead)
        checks.instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
        if tokenizer.eos_token_id is None:
            raise UserError("tokenizer must have an EOS token, it has none: set one")
        if ref_model is not None:
            checks.reference(ref_model, model)
            if num_shared_layers is not None:
                raise UserError("num_shared_layers is for a copy of the model: leave out ref_model")
        if dataset is not None:
            checks.instance("dataset", dataset, Dataset, datasets.Dataset)
            if isinstance(dataset, IterableDataset):
                raise UserError("dataset must give rows by their index, got an IterableDataset")
        if distributed.world_size() > 1:
            raise UserError("PPOTrainer runs in one process: start it without torchrun")
        set_seed(config.seed)
        self.config, self.tokenizer, self.dataset = config, tokenizer, dataset
        self.accelerator = Accelerator(default_device())
        self.current_device = self.accelerator.device
        self.model = model.to(self.current_device).eval()
        if ref_model is None:
            ref_model = create_reference_model(self.model, num_shared_layers)
        self.ref_model = freeze(ref_model.to(self.current_device))
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.model.pretrained_model)
        has_data = dataset is not None
        self.dataloader = self.prepare_dataloader(dataset, data_collator) if has_data else None
        self.parameters = [x for x in self.model.parameters() if x.requires_grad]
        if not self.parameters:
            raise UserError("model must have parameters that require a gradient, got none")
        self.optimizer = optimizer or torch.optim.Adam(self.parameters, lr=config.learning_rate)
        checks.optimizer(self.optimizer, self.parameters)
        self.lr_scheduler = lr_scheduler
        self.kl_ctl = FixedKLController(config.init_kl_coef)
        if config.adap_kl_ctrl:
            self.kl_ctl = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        self.running = RunningMoments()
        self.tracker = make_tracker(config)
        self.current_step = 0
        self.compare_step, self.highest_score = 0, -float("inf")

    def prepare_dataloader(
        self, dataset: Dataset | datasets.Dataset, data_collator: Callable | None = None
    ) -> DataLoader:
        """Shuffled batches of config.batch_size; what is left over at the end is dropped."""
        if isinstance(dataset, datasets.Dataset) and self.config.remove_unused_columns:
            unused = [name for name in dataset.column_names if name not in COLUMNS]
            dataset = dataset.remove_columns(unused)
        if len(dataset) < self.config.batch_size:
            raise UserError(
                f"dataset must have at least batch_size = {self.config.batch_size} rows, got "
                f"{len(dataset)}"
            )
        return DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            collate_fn=data_collator,
            shuffle=True,
            drop_last=True,
        )

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        remove_padding: bool = True,
        **generation_kwargs,
    ):
        """Samples a response to one query, or one to each of a list.

        Args:
            query_tensor: token ids (L,), or a list of such tensors of any lengths.
            length_sampler: draws `max_new_tokens` of each batch.
            batch_size: queries of a list that are answered together.
            return_prompt: whether the query stands before its response.
            generate_ref_response: whether the reference answers too.
            remove_padding: of a list, cut each response after its first EOS.
            generation_kwargs: of transformers' `generate`.

        Returns:
            (1, length) for one query, or as many rows as `num_return_sequences`, a list of
            (length,) for a list; a pair of such, the model's and the reference's, with
            `generate_ref_response`.
        """
        is_list = isinstance(query_tensor, list)
        check_arguments(self.model, query_tensor, batch_size, generation_kwargs)
        queries = query_tensor if is_list else [query_tensor]
        queries = checks.token_rows("query_tensor", queries, self._vocab_size, self.current_device)
        set_temperature(generation_kwargs, self.config.temperature)
        results = []
        for model in (self.model, self.ref_model) if generate_ref_response else (self.model,):
            rows = generate_rows(
                model.eval(),
                queries,
                batch_size,
                length_sampler,
                eos_token_id=self.tokenizer.eos_token_id if is_list and remove_padding else None,
                return_prompt=return_prompt,
                options=generation_kwargs,
            )
            results.append(rows if is_list else torch.stack(rows))
        return tuple(results) if generate_ref_response else results[0]

    @property
    def _vocab_size(self) -> int:
        return self.model.pretrained_model.get_input_embeddings().num_embeddings

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, float | np.ndarray]:
        """One PPO update from config.batch_size responses.

        Args:
            queries, responses: token ids, each (length,).
            scores: of each response, a tensor of one number.
            response_masks: for each response (length,), nonzero where a token counts.

        Returns:
            The statistics that `rlhf.classic.stats` describes: floats, and arrays of what is not
            averaged.

        Raises:
            UserError: naming the argument, the rule and the value.
        """
        config, times, start = self.config, {}, time.perf_counter()
        if not torch.is_grad_enabled():
            raise UserError("step must have gradients: call it outside of torch.no_grad()")
        size, device = config.batch_size, self.current_device
        queries = checks.token_rows("queries", queries, self._vocab_size, device, size)
        responses = checks.token_rows("responses", responses, self._vocab_size, device, size)
        scores = checks.score_list(scores, device, size)
        longest = max(len(q) + len(r) for q, r in zip(queries, responses, strict=True))
        checks.positions(longest, self.model.num_positions)
        if response_masks is None:
            response_masks = [torch.ones_like(response).bool() for response in responses]
        else:
            response_masks = checks.response_masks(response_masks, responses)
        if config.use_score_scaling:
            scores = self.running.scale(scores, centre=config.use_score_norm)
        if config.score_clip is not None:
            scores = scores.clamp(-config.score_clip, config.score_clip)
        self._push_if_best(scores.mean().item())

        self.model.eval()
        with _timed(times, "forward_pass"):
            *inputs, mask = padded(queries, responses, response_masks)
            logprobs, ref_logprobs, kls, values = self._evaluate(*inputs, mask)
        with _timed(times, "compute_rewards"):
            index = torch.arange(mask.shape[1], device=mask.device)
            last = (index * mask).amax(1, keepdim=True)
            rewards = (-self.kl_ctl.value * kls).scatter_add(1, last, scores[:, None])
        with _timed(times, "compute_advantages"):
            if config.whiten_rewards:
                rewards = whiten(rewards, mask) + masked_mean(rewards, mask)
            advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
            advantages = whiten(advantages, mask)
        batch = Batch(*inputs, mask, logprobs, ref_logprobs, kls, values, advantages, returns)
        with _timed(times, "optimize_step"), checkpointed(self.model):
            minibatches = self._update(batch)
        with _timed(times, "calc_stats"):
            stats = describe_step(batch, scores, queries, responses, minibatches, self.kl_ctl.value)
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.kl_ctl.update(stats["objective/kl"], config.batch_size)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if config.optimize_device_cache and self.current_device.type == "cuda":
            torch.cuda.empty_cache()
        times["time/ppo/total"] = time.perf_counter() - start
        return stats | times

    def _push_if_best(self, score: float) -> None:
        """Every config.compare_steps steps, while the model still is the one that was scored."""
        if not self.config.push_to_hub_if_best_kwargs:
            return
        if self.compare_step % self.config.compare_steps == 0 and score > self.highest_score:
            self.highest_score = score
            self.push_to_hub(**self.config.push_to_hub_if_best_kwargs)
        self.compare_step += 1

    def _logits_and_values(
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, L - 1, V) and (B, L - 1): no one asks what follows the last token."""
        logits, _, values = self.model(
            input_ids=input_ids[:, :-1], attention_mask=attention_mask[:, :-1], use_cache=False
        )
        return logits, values

    @torch.no_grad()
    def _evaluate(
        self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs of the model and of the reference, their KL, and values, as in a Batch."""
        temperature, penalty = self.config.temperature, self.config.kl_penalty
        size, parts = self.config.mini_batch_size, []
        for ids, attention in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            logits, values = self._logits_and_values(ids, attention)
            ref_logits = self.ref_model.pretrained_model(
                input_ids=ids[:, :-1], attention_mask=attention[:, :-1], use_cache=False
            ).logits
            logprobs, ref_logprobs = (
                token_logprobs(x, ids[:, 1:], temperature=temperature) for x in (logits, ref_logits)
            )
            if penalty == "full":
                kls = kl_divergence(logits, ref_logits, temperature=temperature)
            else:
                kls = kl_estimate(logprobs, ref_logprobs, estimator=KL_ESTIMATORS[penalty])
            parts.append((logprobs, ref_logprobs, kls, values))
        logprobs, ref_logprobs, kls, values = map(torch.cat, zip(*parts, strict=True))
        return logprobs, ref_logprobs, kls.masked_fill(~mask, 0), values.masked_fill(~mask, 0)

    def _update(self, batch: Batch) -> list[dict[str, Tensor]]:
        """At most ppo_epochs passes over the batch; the statistics of each minibatch."""
        config, minibatches = self.config, []
        self.model.zero_grad()  # of what an interrupted step has left
        for _ in range(config.ppo_epochs):
            # NumPy's generator, for TRL took the order from it.
            order = torch.from_numpy(np.random.permutation(config.batch_size))
            for rows in order.to(self.current_device).split(config.backward_batch_size):
                count = batch.mask[rows].sum()
                for index in rows.split(config.mini_batch_size):
                    minibatches.append(self._train_minibatch(batch.rows(index), count))
                if config.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
                self.optimizer.step()
                self.model.zero_grad()
            policykl = minibatches[-1]["policy/policykl"]
            if config.early_stopping and policykl > 1.5 * config.target_kl:
                break
        return minibatches

    def _train_minibatch(self, batch: Batch, count: Tensor) -> dict[str, Tensor]:
        """Adds the minibatch's share of the gradient of an optimizer step over `count` tokens."""
        config, mask = self.config, batch.mask
        logits, values = self._logits_and_values(batch.input_ids, batch.attention_mask)
        policy = ppo_loss_(
            logits,
            batch.tokens,
            batch.logprobs,
            batch.advantages,
            mask,
            clip_low=config.cliprange,
            clip_high=config.cliprange,
            temperature=config.temperature,
        )
        critic = value_loss(values, batch.values, batch.returns, mask, clip=config.cliprange_value)
        ratio = (policy.logprobs - batch.logprobs).exp().masked_fill(~mask, 1)
        mean_ratio = masked_mean(ratio, mask).item()
        if mean_ratio > config.ratio_threshold:
            warnings.warn(
                f"a minibatch is skipped: its mean ratio {mean_ratio:.2f} is above ratio_threshold "
                f"{config.ratio_threshold}",
                stacklevel=4,
            )
        else:
            loss = policy.loss + config.vf_coef * critic.loss
            (loss * (mask.sum() / count)).backward()
        return describe_minibatch(batch, policy, critic, values.detach(), ratio, config.vf_coef)

    def log_stats(
        self,
        stats: dict[str, float | np.ndarray],
        batch: dict[str, Sequence],
        rewards: Iterable[Tensor | float],
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Writes the statistics, and those of `rewards` as `env/reward_*`, to config.log_with.

        TensorBoard is given the numbers among them; wandb also the arrays, and a table of
        `columns_to_log` of the batch with the rewards.
        """
        if self.tracker is None:
            return
        rewards = torch.tensor([float(reward) for reward in rewards])
        table = {"reward": rewards.tolist()}
        if self.config.log_with == "wandb":
            missing = [name for name in columns_to_log if name not in batch]
            if missing:
                raise UserError(f"columns_to_log must be keys of batch, it has no {missing[0]!r}")
            table = {name: batch[name] for name in columns_to_log} | table
        values = stats | {
            "env/reward_mean": rewards.mean().item(),
            "env/reward_std": deviation(rewards).item(),
            "env/reward_dist": rewards.numpy(),
        }
        self.current_step += 1
        self.tracker(values, table, self.current_step)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """The model with its value head, and the tokenizer; with `push_to_hub` also to the hub, as
        `repo_id` or under the folder's name, with further arguments of `push_to_hub`."""
        if kwargs and not push_to_hub:
            raise UserError(f"{next(iter(kwargs))} is for push_to_hub: leave it out")
        folder = Path(save_directory)
        save_model(
            folder,
            self.model,
            self.tokenizer,
            remedy="free some space or choose another folder",
        )
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name, **kwargs)

    _save_pretrained = save_pretrained

    def push_to_hub(self, repo_id: str, **kwargs) -> None:
        self.model.push_to_hub(repo_id, **kwargs)
        self.tokenizer.push_to_hub(repo_id, **kwargs)


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[f"time/ppo/{name}"] = time.perf_counter() - start
