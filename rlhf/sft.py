"""Supervised fine-tuning: next-token cross-entropy on texts, or on completions of prompts."""

import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ppo_kernels import masked_mean, token_logprobs
from rlhf import distributed
from rlhf.config.training import SFTConfig
from rlhf.data.loaders import Text, load_texts
from rlhf.data.padding import pad
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.passes import autocast, check_fits, default_device, enable_gradient_checkpointing
from rlhf.models.proof import prove_causal
from rlhf.report.card import write_card
from rlhf.run.metrics import MetricsLog, plot_metrics
from rlhf.run.progress import num_passes
from rlhf.run.safe_points import SafePoints, stoppable
from rlhf.run.saving import Checkpoints, is_due
from rlhf.supervised import SupervisedTrainer

SHOWN = ("loss", "eval/loss", "eval/perplexity", "tokens_per_second", "lr")


def token_loss(
    model: nn.Module, texts: list[Text], pad_token_id: int, denominator: float
) -> Tensor:
    """Sum of -log p over the tokens that are learnt, divided by `denominator`."""
    ids, mask = (x.to(default_device()) for x in pad([text.ids for text in texts], pad_token_id))
    learnt, _ = pad([text.learnt for text in texts], False)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = token_logprobs(logits[:, :-1], ids[:, 1:])
    return -masked_mean(logprobs, learnt[:, 1:].to(ids.device), denominator=denominator)


def count_learnt(texts: list[Text]) -> int:
    return sum(sum(text.learnt) for text in texts)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[Text],
    config: SFTConfig,
) -> dict[str, float]:
    """Cross-entropy in nats per token, and perplexity; the texts are divided over the processes."""
    model.eval()
    texts = sorted(texts, key=lambda text: len(text.ids))
    size, total = config.per_device_eval_batch_size, count_learnt(texts)
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    num_processes = distributed.world_size()
    loss = torch.zeros((), device=model.device)
    for batch in distributed.my_share(batches):
        with autocast(config.bf16):
            loss += num_processes * token_loss(model, batch, tokenizer.pad_token_id, total)
    loss = distributed.mean_of({"loss": loss})["loss"]
    model.train()
    return {"eval/loss": loss.item(), "eval/perplexity": loss.exp().item()}


def prepare(
    config: SFTConfig,
) -> tuple[PreTrainedTokenizerBase, list[Text], list[Text], PreTrainedModel]:
    """The tokenizer, the texts to learn from, the held-out ones, and the model, which fits them."""
    path = config.model_name_or_path
    tokenizer = load_tokenizer(path, config, config.revision)
    texts = load_texts(config, config.dataset_name, config.dataset_split, tokenizer)
    eval_texts = []
    if config.eval_dataset_name is not None:
        eval_texts = load_texts(
            config, config.eval_dataset_name, config.eval_dataset_split, tokenizer
        )
    model = load_causal_lm(path, config, revision=config.revision)
    prove_causal(model, path)
    longest = max(len(text.ids) for text in texts + eval_texts)
    check_fits(model, tokenizer, longest, "lower max_length")
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return tokenizer, texts, eval_texts, model


@stoppable("sft")
def train_sft(config: SFTConfig) -> dict[str, float]:
    """Trains and saves a causal language model; returns the last metrics."""
    start_time = time.perf_counter()
    set_seed(config.seed)
    tokenizer, texts, eval_texts, model = distributed.together(lambda: prepare(config))
    lengths = [len(text.ids) for text in texts]
    trainer = SupervisedTrainer(config, model, texts, lengths, eval_texts)
    checkpoints = Checkpoints(config, "sft", trainer, {"": model}, tokenizer)
    metrics = checkpoints.resume()
    output_dir, total = checkpoints.run.output_dir, trainer.num_steps
    safe_points = SafePoints(checkpoints, "sft", trainer.step, metrics)

    with MetricsLog(output_dir, "sft", total, config.report_to, SHOWN, step=trainer.step) as log:
        num_tokens, since = 0, time.perf_counter()
        for batch in trainer.batches:
            num_learnt = sum(count_learnt([texts[i] for i in rows]) for rows in batch)
            for rows, weight in trainer.passes(batch):
                safe_points.check()
                micro = [texts[i] for i in rows]
                with autocast(config.bf16):
                    loss = token_loss(trainer.parallel, micro, tokenizer.pad_token_id, num_learnt)
                trainer.backward(weight, {"loss": loss})
            trainer.take_step()
            num_tokens += sum(len(texts[i].ids) for rows in batch for i in rows)
            log.advance()
            if is_due(config.logging_steps, trainer.step, total):
                figures = trainer.take_metrics()
                figures["tokens_per_second"] = num_tokens / (time.perf_counter() - since)
                num_tokens, since = 0, time.perf_counter()
                log.write(trainer.step, figures)
                metrics |= figures
            if eval_texts and is_due(config.eval_steps, trainer.step, total):
                passes = num_passes(
                    len(eval_texts), config.per_device_eval_batch_size, distributed.world_size()
                )
                with log.phase("eval", passes, model.register_forward_hook):
                    figures = evaluate(model, tokenizer, eval_texts, config)
                log.write(trainer.step, figures)
                metrics |= figures
            if config.save_steps and is_due(config.save_steps, trainer.step, total):
                checkpoints.save(trainer.step, metrics)
            safe_points.reached(trainer.step, metrics)

    metrics["steps"] = total

    def finish() -> None:
        checkpoints.save_models(output_dir)
        plot_metrics(output_dir, {"loss": ("loss", "eval/loss")})
        write_card(output_dir, "sft", config, metrics)

    try:
        if config.load_best_model_at_end:
            checkpoints.load_best()
    finally:  # with the last model, if the best one is damaged
        distributed.from_main(finish)
    return metrics | {"seconds": time.perf_counter() - start_time}
