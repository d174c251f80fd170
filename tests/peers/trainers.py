"""TRL's trainers on a tiny Llama made on the spot, and what a run of one costs."""

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>"}


class Run(NamedTuple):
    """What a trainer logged, its weights, wall seconds and the process's CPU seconds, those of
    PPO's updates alone, and the peak of memory beyond the start's."""

    logs: list[dict[str, float]]
    weights: list[torch.Tensor]
    wall_s: float
    cpu_s: float
    update_cpu_s: float
    peak_mib: float

    def __str__(self):
        cost = f"{self.wall_s:.2f} s ({self.cpu_s:.2f} s of CPU), peak +{self.peak_mib:.0f} MiB"
        return f"{cost}, updates {self.update_cpu_s:.2f} s of CPU" if self.update_cpu_s else cost


def tokenizer_of(vocabulary):
    """Words w0, w1, ... and two special tokens."""
    words = [*SPECIAL.values(), *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(vocabulary), strict=True))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL)


def llama(vocabulary, kind=LlamaForCausalLM):
    return kind(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            attention_dropout=0.0,
            initializer_range=0.3,
            **({"num_labels": 1} if kind is LlamaForSequenceClassification else {}),
        )
    )


def _resident_mib(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def _measured(trainer):
    """Train. TRL's PPO makes its updates within `accelerator.accumulate`, and nothing else."""
    updates = 0.0
    accumulate = trainer.accelerator.accumulate

    @contextlib.contextmanager
    def timed(*models):
        nonlocal updates
        start = time.process_time()
        with accumulate(*models):
            yield
        updates += time.process_time() - start

    trainer.accelerator.accumulate = timed
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts from here.
    resident = _resident_mib("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    set_seed(0)
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = max(0.0, _resident_mib("VmHWM") - resident)
    weights = [x.detach().clone() for x in trainer.model.parameters()]
    return Run(trainer.state.log_history, weights, wall, cpu, updates, peak)


def ppo(folder, vocabulary, *, response_length=16, batch=16, steps=2, epochs=2):
    """TRL's PPO trainer: a policy, its reference, a reward model and a critic, all random."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    set_seed(0)
    tokenizer = tokenizer_of(vocabulary)
    policy, reference = llama(vocabulary), llama(vocabulary)
    reference.load_state_dict(policy.state_dict())
    reward, critic = (llama(vocabulary, LlamaForSequenceClassification) for _ in range(2))
    prompts = [tokenizer(f"w{i} w{i + 1} w{2 * i}")["input_ids"] for i in range(batch)]
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            num_sample_generations=0,
            seed=0,
            learning_rate=1e-3,
            temperature=0.9,
            per_device_train_batch_size=batch // 2,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=epochs,
            local_rollout_forward_batch_size=batch,
            total_episodes=steps * (batch // 2),
            response_length=response_length,
        ),
        tokenizer,
        policy,
        reference,
        reward,
        Dataset.from_dict({"input_ids": prompts}),
        critic,
        eval_dataset=Dataset.from_dict({"input_ids": prompts}),
    )
    return _measured(trainer)


def _length_of_words(completions, **columns):
    """A reward that differs within a group."""
    return [sum(len(word) for word in text.split()) / 50 for text in completions]


def grpo(folder, vocabulary, *, response_length=16, batch=16, steps=2):
    """TRL's GRPO trainer: off-policy from the second iteration on, with KL and entropy."""
    from trl import GRPOConfig, GRPOTrainer

    set_seed(0)
    model = str(folder / "model")  # A folder, from which the reference is loaded again.
    llama(vocabulary).save_pretrained(model)
    trainer = GRPOTrainer(
        model,
        _length_of_words,
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            logging_steps=1,
            seed=0,
            learning_rate=1e-3,
            temperature=0.9,
            beta=0.04,
            num_iterations=2,
            num_generations=4,
            per_device_train_batch_size=batch,
            max_steps=2 * steps,
            max_completion_length=response_length,
        ),
        processing_class=tokenizer_of(vocabulary),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(batch)]}),
    )
    return _measured(trainer)
