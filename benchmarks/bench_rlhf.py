"""One iteration of PPO by phase: responses, their evaluation, the update; and its peak memory.

A Llama of two layers of 128 channels, 64 prompts of 16 tokens, 64 new tokens each, four epochs of
one step (`benchmarks.peers_rlhf` sets it beside TRL). With a vocabulary of 32,000 from logits and
from hidden states. On a GPU in bf16, with the backend that `auto` takes there.
"""

import statistics
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from benchmarks import harness
from benchmarks.peers_rlhf import EPOCHS, PHASES, RESPONSE_LENGTH, ROWS, iterate, make_trainer

ROUNDS = 3
# Responses in a pass where they have the widest vocabulary, so that logits outweigh the models.
MICRO_BATCH = {1024: 16, 32_000: 32}


def build(vocabulary: int, **options):
    with TemporaryDirectory() as folder:
        size = MICRO_BATCH[vocabulary]
        return make_trainer(Path(folder), vocabulary, per_device_train_batch_size=size, **options)


def peak_bytes(vocabulary: int, options: dict) -> int:
    """What evaluation and update allocate at most beyond what stands before, on the CPU."""
    trainer = build(vocabulary, **options)
    iterate(trainer)  # makes the optimizer's state
    rows = trainer.next_rows()
    responses = trainer.sample(trainer.prompts, rows, trainer.generator)
    return harness.peak_bytes_cpu(lambda: trainer.update(trainer.evaluate(rows, responses)))


@pytest.mark.parametrize(
    ("vocabulary", "options", "variant"),
    [
        (1024, {}, "V = 1,024"),
        (1024, {"share_trunk": True}, "V = 1,024, shared trunk"),
        (32_000, {"logits_from": "logits"}, "V = 32,000, from logits"),
        (32_000, {"logits_from": "hidden"}, "V = 32,000, from hidden states"),
    ],
    ids=str,
)
def test_ppo_iteration(benchmark, setting, memory_pool, vocabulary, options, variant):
    options = options | {"bf16": setting.name != "cpu"}
    trainer = build(vocabulary, **options)
    phases = defaultdict(list)

    def run():
        for name, seconds in iterate(trainer).items():
            phases[name].append(seconds)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    assert trainer.iteration == len(phases["update"]) == ROUNDS + 1
    medians = {name: statistics.median(phases[name][1:]) for name in PHASES}
    num_tokens = ROWS * RESPONSE_LENGTH
    benchmark.extra_info |= {
        "op": "PPO iteration",
        "variant": variant,
        "shape": [ROWS, RESPONSE_LENGTH],
        "epochs": EPOCHS,
        "dtype": "bfloat16" if options["bf16"] else "float32",
        "phase_seconds": medians,
        "phase_tokens_per_second": {name: num_tokens / each for name, each in medians.items()},
        "tokens_per_second": num_tokens / benchmark.stats.stats.median,
    }
    if setting.name == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    elif isinstance(memory_pool, str):
        benchmark.extra_info["memory_not_measured"] = memory_pool
        return
    else:
        del trainer
        peak = memory_pool.submit(peak_bytes, vocabulary, options).result()
    benchmark.extra_info["peak_mb"] = peak / 2**20
