"""The counting toy: a policy that knows nothing learns to say one word only.

A Llama with two layers of 32 channels and a vocabulary of 36 sees two random words and answers with
exactly twelve; the reward is how often `t5` is among these, 12 / 35 untrained and 12 at best. The
training is the ordinary `train_ppo`, so a curve unlike the known one shows a mistake in PPO itself.
"""

import random
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.config.ppo import PPOConfig
from rlhf.demo.base import write_jsonl
from rlhf.ppo.train import train_ppo
from rlhf.run.metrics import read_metrics
from rlhf.run.state import save_model

# Mean reward, of 12, that a run must reach.
THRESHOLD = 11.7

PAD, EOS, BOS, UNKNOWN = SPECIAL = ("[PAD]", "<eos>", "<bos>", "<unk>")
WORDS = [f"t{number}" for number in range(32)]
COUNTED = "t5"
RESPONSE_LENGTH = 12
BATCH_SIZE = 16
UPDATES = 128


def count(completions: list[str]) -> list[int]:
    """The reward: how often the counted word occurs."""
    return [text.split().count(COUNTED) for text in completions]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; <bos> comes before what it encodes."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNKNOWN
    )


def make_world(folder: Path, seed: int) -> PPOConfig:
    """Writes the untrained policy and the prompts, a new one for each response, into `folder`;
    returns the configuration of the run on them."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    save_model(folder / "base", LlamaForCausalLM(config), tokenizer)
    rng = random.Random(seed)
    prompts = (" ".join(rng.choices(WORDS, k=2)) for _ in range(UPDATES * BATCH_SIZE))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    return PPOConfig(
        model_name_or_path=str(folder / "base"),
        dataset_name=str(folder / "prompts.jsonl"),
        output_dir=str(folder / "ppo"),
        total_episodes=UPDATES * BATCH_SIZE,
        per_device_train_batch_size=BATCH_SIZE,
        num_ppo_epochs=4,
        num_mini_batches=1,
        learning_rate=1e-3,
        # At 1e-3 the critic, a model of its own that begins near 0, is slow to reach returns of 10,
        # and one run in four falls behind.
        critic_learning_rate=3e-3,
        max_grad_norm=1e9,  # that is, not clipped
        lr_scheduler_type="linear",
        kl_coef=0.05,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        whiten_advantages=True,
        # EOS cannot end a response before its longest length.
        min_response_length=RESPONSE_LENGTH,
        response_length=RESPONSE_LENGTH,
        seed=seed,
        logging_steps=4,
        save_steps=0,
        report_to="none",
    )


def run_counting(seed: int) -> dict[str, float]:
    """Trains a policy in a temporary folder and returns its figures.

    `score_at_40`: mean reward of updates 36, 40 and 44. `score` and `kl`: mean reward, and mean KL
    from the untrained policy in nats per response, of updates 120, 124 and 128. `seconds`: of the
    128 updates, by those that are logged; loading, saving and plotting come on top.
    """
    with TemporaryDirectory() as folder:
        config = make_world(Path(folder), seed)
        train_ppo(config, [count])
        records = {record["step"]: record for record in read_metrics(Path(config.output_dir))}

    def mean(steps: Iterable[int], *names: str) -> float:
        return fmean(sum(records[step][name] for name in names) for step in steps)

    last = (120, 124, 128)
    return {
        "score_at_40": mean((36, 40, 44), "objective/scores"),
        "score": mean(last, "objective/scores"),
        "kl": mean(last, "objective/kl"),
        "seconds": UPDATES * mean(records, "time/generate", "time/evaluate", "time/update"),
    }
