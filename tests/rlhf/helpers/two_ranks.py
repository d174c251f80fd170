"""A script for two processes, of test_distributed.py: `two_ranks.py CONFIG.yaml FOLDER`."""

import json
import math
import os
import sys
from pathlib import Path

from rlhf import distributed


def odd_one_out(completions):
    """The ranks' scores differ by far, and in the second iteration the last rank's are NaN."""
    odd_one_out.calls += 1
    rank = distributed.rank()
    bad = odd_one_out.calls > 1 and rank == distributed.world_size() - 1
    return [math.nan if bad else 5.0 * rank + len(text) for text in completions]


odd_one_out.calls = 0


def observe(config_file: str, folder: str) -> None:
    from rlhf.errors import UserError

    trainer = load(config_file)
    batch = collect(trainer)
    mine = distributed.my_rows(trainer.batch_size)
    result = {}
    for name, rows in (("all", slice(None)), ("mine", mine)):
        advantages = batch.advantages[rows][batch.responses.mask[rows]]
        result[name] = [advantages.mean().item(), advantages.std(correction=0).item()]
    trainer.update(batch)
    try:
        collect(trainer)
    except UserError as error:
        result["error"] = str(error)
    result["from hidden"] = {
        model: gradients_differ(config_file, model) for model in ("llama", "gpt2")
    }
    Path(folder, f"rank-{distributed.rank()}.json").write_text(json.dumps(result))


def load(config_file: str, **changes: str):
    from rlhf.cli import parse_config
    from rlhf.ppo.trainer import PPOTrainer

    options = [text for name, value in changes.items() for text in (f"--{name}", value)]
    return PPOTrainer(parse_config("ppo", ["--config", config_file, *options]))


def gradients_differ(config_file: str, model: str) -> float:
    """By how much the gradients of a step from hidden states differ from those from logits,
    relative to the largest. The GPT-2 ties its head, the Llama does not."""
    import torch

    path = str(Path(config_file).with_name(model))
    gradients = []
    for kind in ("logits", "hidden"):
        trainer = load(
            config_file,
            model_name_or_path=path,
            critic_model_path=f"{path}-reward",
            logits_from=kind,
            min_response_length="2",
            reward_funcs=f"{path}-reward",
        )
        trainer._gradient(collect(trainer), torch.arange(trainer.batch_size))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    logits, hidden = gradients
    return ((logits - hidden).abs().max() / logits.abs().max()).item()


def collect(trainer):
    rows = trainer.next_rows()
    return trainer.evaluate(rows, trainer.sample(trainer.prompts, rows, trainer.generator))


if __name__ == "__main__":
    with distributed.session():
        observe(*sys.argv[1:])
    os._exit(0)  # as `python -m rlhf` does
