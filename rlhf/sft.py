"""Supervised fine-tuning: next-token cross-entropy on texts, or on completions of prompts."""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kernels import masked_mean, token_logprobs
from rlhf.checkpoint import save_model, start_run
from rlhf.config import SFTConfig
from rlhf.data import Text, count_steps, load_texts, micro_batches, pad
from rlhf.metrics import MetricsLog, plot_metrics
from rlhf.models import autocast, check_fits, load_causal_lm, load_tokenizer
from rlhf.optim import clip_gradients, make_optimizer


def token_loss(
    model: PreTrainedModel, texts: list[Text], pad_token_id: int, denominator: float
) -> Tensor:
    """Sum of -log p over the tokens that are learnt, divided by `denominator`."""
    ids, mask = pad([text.ids for text in texts], pad_token_id)
    ids, mask = ids.to(model.device), mask.to(model.device)
    start = torch.tensor([text.start for text in texts], device=model.device)
    learnt = mask & (torch.arange(ids.shape[1], device=model.device) >= start[:, None])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = token_logprobs(logits[:, :-1], ids[:, 1:])
    return -masked_mean(logprobs, learnt[:, 1:], denominator=denominator)


def count_learnt(texts: list[Text]) -> int:
    return sum(len(text.ids) - text.start for text in texts)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[Text],
    config: SFTConfig,
) -> dict[str, float]:
    """Cross-entropy in nats per token, and perplexity."""
    model.eval()
    texts = sorted(texts, key=lambda text: len(text.ids))
    size, total = config.per_device_eval_batch_size, count_learnt(texts)
    loss = torch.zeros(())
    for start in range(0, len(texts), size):
        with autocast(config.bf16):
            batch = texts[start : start + size]
            loss += token_loss(model, batch, tokenizer.pad_token_id, total).cpu()
    return {"eval/loss": loss.item(), "eval/perplexity": loss.exp().item()}


def train_sft(config: SFTConfig) -> dict[str, float]:
    """Trains and saves a causal language model; returns the last metrics."""
    start_time = time.perf_counter()
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model_name_or_path)
    texts = load_texts(config.dataset_name, tokenizer, config.max_length)
    eval_texts = None
    if config.eval_dataset_name is not None:
        eval_texts = load_texts(config.eval_dataset_name, tokenizer, config.max_length)
    model = load_causal_lm(config.model_name_or_path)
    longest = max(len(text.ids) for text in texts + (eval_texts or []))
    check_fits(model, tokenizer, longest, "lower max_length")
    output_dir = start_run(config, "sft")

    num_steps = count_steps(len(texts), config)
    optimizer, scheduler = make_optimizer([(model, config.learning_rate)], config, num_steps)
    generator = torch.Generator().manual_seed(config.seed)
    batches = micro_batches([len(text.ids) for text in texts], config, generator)

    shown = ("loss", "eval/loss", "eval/perplexity", "tokens_per_second", "lr")
    with MetricsLog(output_dir, "sft", num_steps, config.report_to, shown) as log:
        model.train()
        losses, num_tokens, since = [], 0, time.perf_counter()
        for step, batch in zip(range(1, num_steps + 1), batches, strict=False):
            micro_texts = [[texts[i] for i in indices] for indices in batch]
            denominator = sum(count_learnt(micro) for micro in micro_texts)
            loss = torch.zeros((), device=model.device)
            for micro in micro_texts:
                with autocast(config.bf16):
                    micro_loss = token_loss(model, micro, tokenizer.pad_token_id, denominator)
                micro_loss.backward()
                loss += micro_loss.detach()
            grad_norm = clip_gradients(model, config.max_grad_norm)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss)
            num_tokens += sum(len(text.ids) for micro in micro_texts for text in micro)
            log.advance()
            if step % config.logging_steps == 0 or step == num_steps:
                metrics = {
                    "loss": torch.stack(losses).mean().item(),
                    "grad_norm": grad_norm.item(),
                    "lr": learning_rate,
                    "tokens_per_second": num_tokens / (time.perf_counter() - since),
                }
                log.write(step, metrics)
                losses, num_tokens, since = [], 0, time.perf_counter()
        save_model(output_dir, model, tokenizer)
        if eval_texts is not None:
            metrics |= evaluate(model, tokenizer, eval_texts, config)
            log.write(num_steps, {k: v for k, v in metrics.items() if k.startswith("eval/")})
    plot_metrics(output_dir, {"loss": ("loss",)})
    return metrics | {"steps": num_steps, "seconds": time.perf_counter() - start_time}
