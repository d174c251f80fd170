"""Positive film reviews with the classic API: a GPT-2 tuned on reviews continues their first words,
a sentiment classifier scores what it writes, and PPO makes it write what scores well.

The same experiment through `rlhf ppo` is `gpt2-imdb.yaml`. Without a hub, `make_local.py` makes
models and data that stand in for those named here.
"""

import sys
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from datasets import Dataset
from rich.progress import track
from sentiment import positive_scorer
from transformers import HfArgumentParser, PreTrainedTokenizerBase, set_seed

from rlhf.classic import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer
from rlhf.data.columns import load_columns
from rlhf.errors import UserError
from rlhf.models.loading import load_tokenizer
from rlhf.run.files import disk_errors

PROMPT_TOKENS = (2, 8)
RESPONSE_TOKENS = (4, 16)


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder for the trained model and its tokenizer."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Calls of step() (default: one pass over the data)."}
    )

    def __post_init__(self):
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"max_steps must be >= 1, got {self.max_steps}")


def build_dataset(name: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The beginnings of the reviews in the column `text`: `input_ids` and the text `query`."""
    columns = load_columns(name)
    if "text" not in columns:
        raise UserError(f"{name} must have a column text, it has {list(columns)}")
    length = LengthSampler(*PROMPT_TOKENS)
    rows = [ids[: length()] for ids in tokenizer(list(columns["text"])).input_ids]
    rows = [ids for ids in rows if len(ids) >= PROMPT_TOKENS[0]]
    queries = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return Dataset.from_dict({"input_ids": rows, "query": queries}).with_format("torch")


def collate(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def main(argv: list[str] | None = None) -> list[float]:
    """Runs the experiment; returns the mean reward of each step."""
    parser = HfArgumentParser((PPOConfig, Arguments), description=__doc__)
    parser.set_defaults(model_name="lvwerra/gpt2-imdb")
    config, arguments = parser.parse_args_into_dataclasses(argv)
    with disk_errors(f"make output_dir {arguments.output_dir}", "choose another folder"):
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)  # of the prompts' lengths; the trainer sets it again

    tokenizer = load_tokenizer(config.model_name)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    dataset = build_dataset(config.query_dataset, tokenizer)
    config.project_kwargs["logging_dir"] = arguments.output_dir
    trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset, data_collator=collate)
    score = positive_scorer(config.reward_model.removeprefix("sentiment-analysis:"))

    generation = {
        "min_length": -1,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": tokenizer.eos_token_id,
    }
    response_length = LengthSampler(*RESPONSE_TOKENS)
    means = []
    batches = chain.from_iterable(repeat(trainer.dataloader))
    num_steps = arguments.max_steps or len(trainer.dataloader)
    for batch in track(islice(batches, num_steps), "PPO", num_steps):
        responses = []
        for query in batch["input_ids"]:
            generation["max_new_tokens"] = response_length()
            output = trainer.generate(query, **generation).squeeze(0)
            responses.append(output[len(query) :])
        batch["response"] = tokenizer.batch_decode(responses, skip_special_tokens=True)
        texts = [
            query + text for query, text in zip(batch["query"], batch["response"], strict=True)
        ]
        rewards = [torch.tensor(reward) for reward in score(texts)]
        stats = trainer.step(batch["input_ids"], responses, rewards)
        trainer.log_stats(stats, batch, rewards)
        means.append(stats["ppo/mean_scores"])
        if len(means) % 10 == 0:
            mean, kl = sum(means[-10:]) / 10, stats["objective/kl"]
            print(f"step {len(means)}: reward {mean:.3f} over 10 steps, KL {kl:.2f}", flush=True)
    trainer.save_pretrained(arguments.output_dir)
    return means


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
