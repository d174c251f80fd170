"""What the worlds of text share: files of examples, a tokenizer and a model made on the spot, and
the settings of PPO."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.run.state import save_model

MAX_LENGTH = 256
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
PPO_SETTINGS = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "learning_rate": 3e-4,
    "critic_learning_rate": 1e-3,
    "warmup_ratio": 0.05,
    "kl_coef": 0.05,
    "logging_steps": 2,
    "save_steps": 0,
}


class Stopwatch:
    """Seconds of each part of a run, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def write_jsonl(path: Path, rows: Iterable[Mapping]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the texts; it puts <bos> in front of what it encodes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def make_base(
    path: Path, texts: Sequence[str], vocab_size: int, hidden_size: int, num_layers: int, seed: int
) -> PreTrainedTokenizerFast:
    """Saves an untrained Llama and a tokenizer of the texts in `path`; returns the tokenizer.

    The model has heads of 32 channels and ties its embeddings.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(path, LlamaForCausalLM(config), tokenizer)
    return tokenizer
