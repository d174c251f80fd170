"""A world of ten words: reviews of two to four words that end with a full stop."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf.demo.base import write_jsonl
from rlhf.models.loading import load_scorer
from rlhf.run.state import save_model

GOOD, BAD = ("good", "fine", "great"), ("bad", "dull", "weak")
WORDS = ("<pad>", "<bos>", "<eos>", "film", "plot", "is", ".", *GOOD, *BAD)
EOS = WORDS.index("<eos>")


def review(rng: random.Random, words: tuple[str, ...] = GOOD + BAD) -> str:
    opinions = " ".join(rng.choice(words) for _ in range(rng.randint(1, 3)))
    return f"{rng.choice(('film', 'plot'))} is {opinions} ."


def make_tokenizer() -> PreTrainedTokenizerFast:
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def make_world(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Untrained models `llama`, `gpt2`, `llama-reward`, `gpt2-reward`, and every stage's data."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            **special,
        )
    )
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=64, **special)
    )
    for name, model in (("llama", llama), ("gpt2", gpt2)):
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
        scorer = load_scorer(str(path / name), tokenizer)
        save_model(path / f"{name}-reward", scorer, tokenizer)

    rng = random.Random(0)
    write_jsonl(path / "texts.jsonl", [{"text": review(rng)} for _ in range(400)])
    write_jsonl(
        path / "pairs.jsonl",
        [
            {"prompt": "", "chosen": review(rng, GOOD), "rejected": review(rng, BAD)}
            for _ in range(200)
        ],
    )
    prompts = ("film", "plot is", "film is good")
    write_jsonl(path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
