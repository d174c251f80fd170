"""PPO iterations of this trainer beside those of TRL 1.12.0 and TRL 0.11.4.

`python -m benchmarks.peers_rlhf --trl112 PYTHON --trl0114 PYTHON`, each in its own interpreter; one
that is not given is left out.

All have the same models and sizes, and take turns, an iteration each, so that what else runs on the
machine slows all alike. `sample` makes the responses; `evaluate` gives them log-probs, values,
scores and advantages; `update` is the epochs of optimizer steps. TRL 0.11.4 has a critic on the
policy's trunk only, and so has `shared trunk`.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROWS, PROMPT_LENGTH, RESPONSE_LENGTH, EPOCHS = 64, 16, 64, 4
PHASES = ("sample", "evaluate", "update")
MODEL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def make_tokenizer(size: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(2, size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_prompts(size: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, size) for _ in range(PROMPT_LENGTH)] for _ in range(8 * ROWS)]


def make_models() -> list:
    """Four Llamas alike: a policy, its reference, and, with scalar heads, critic and reward."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    kinds = [LlamaForCausalLM] * 2 + [LlamaForSequenceClassification] * 2
    models = []
    for kind in kinds:
        torch.manual_seed(0)
        models.append(kind(LlamaConfig(**MODEL, num_labels=1)))
    return models


def make_trainer(folder: Path, vocab_size: int = MODEL["vocab_size"], **options):
    """This trainer on models with a vocabulary of this size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf.config.ppo import PPOConfig
    from rlhf.demo.base import write_jsonl
    from rlhf.models.loading import load_scorer
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.run.state import save_model

    torch.manual_seed(0)
    tokenizer = make_tokenizer(vocab_size)
    policy = LlamaForCausalLM(LlamaConfig(**MODEL | {"vocab_size": vocab_size}))
    save_model(folder / "policy", policy, tokenizer)
    scorer = load_scorer(str(folder / "policy"), tokenizer)
    save_model(folder / "reward", scorer, tokenizer)
    prompts = map(tokenizer.decode, make_prompts(vocab_size))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    config = {
        "model_name_or_path": str(folder / "policy"),
        "reward_funcs": [str(folder / "reward")],
        "dataset_name": str(folder / "prompts.jsonl"),
        "output_dir": "",
        "rollout_batch_size": ROWS,
        "num_ppo_epochs": EPOCHS,
        "response_length": RESPONSE_LENGTH,
        "min_response_length": RESPONSE_LENGTH,
    }
    return PPOTrainer(PPOConfig(**config | options))


def iterate(trainer) -> dict[str, float]:
    """An iteration; the seconds of its phases."""
    times = [time.perf_counter()]
    rows = trainer.next_rows()
    responses = trainer.sample(trainer.prompts, rows, trainer.generator)
    times.append(time.perf_counter())
    batch = trainer.evaluate(rows, responses)
    times.append(time.perf_counter())
    trainer.update(batch)
    times.append(time.perf_counter())
    return seconds(times)


def seconds(times: list[float]) -> dict[str, float]:
    return {name: times[i + 1] - times[i] for i, name in enumerate(PHASES)}


def ours(micro_batch: int, **options) -> Iterator[dict[str, float]]:
    with TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), per_device_train_batch_size=micro_batch, **options)
    while True:
        yield iterate(trainer)


def trl112(micro_batch: int, turn) -> None:
    """Each iteration of its `train` ends in a callback, which waits there for the next turn."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    times = []

    def noting(name: str) -> None:
        function = getattr(ppo_trainer, name)

        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            times.append(time.perf_counter())
            return result

        setattr(ppo_trainer, name, wrapped)

    noting("batch_generation")
    noting("masked_whiten")  # of the advantages, with which the evaluation ends

    class Turns(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            turn(seconds([*times, time.perf_counter()]))
            times[:] = [time.perf_counter()]

    policy, reference, critic, reward = make_models()
    with TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=ROWS // micro_batch,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=ROWS,
            response_length=RESPONSE_LENGTH,
            total_episodes=10**6,
            num_sample_generations=0,
            temperature=1.0,
            learning_rate=1e-5,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=make_tokenizer(MODEL["vocab_size"]),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": make_prompts(MODEL["vocab_size"])}),
            eval_dataset=Dataset.from_dict({"input_ids": make_prompts(MODEL["vocab_size"])}),
            callbacks=[Turns()],
        )
        turn(None)
        times.append(time.perf_counter())
        trainer.train()


def trl0114(micro_batch: int) -> Iterator[dict[str, float]]:
    """Its critic is a head on the policy's trunk; the reward model is as in the others."""
    import torch
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    policy, reference, _, reward = make_models()
    config = PPOConfig(
        batch_size=ROWS,
        mini_batch_size=micro_batch,
        gradient_accumulation_steps=ROWS // micro_batch,
        ppo_epochs=EPOCHS,
        learning_rate=1e-5,
    )
    trainer = PPOTrainer(
        config,
        *map(AutoModelForCausalLMWithValueHead.from_pretrained, (policy, reference)),
        make_tokenizer(MODEL["vocab_size"]),
    )
    prompts = [torch.tensor(ids) for ids in make_prompts(MODEL["vocab_size"])]
    sampling = {
        "max_new_tokens": RESPONSE_LENGTH,
        "min_new_tokens": RESPONSE_LENGTH,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": 0,
    }
    while True:
        queries = random.sample(prompts, ROWS)
        start = time.perf_counter()
        responses = trainer.generate(queries, batch_size=ROWS, return_prompt=False, **sampling)
        sampled = time.perf_counter()
        with torch.no_grad():
            ids = torch.stack([torch.cat(pair) for pair in zip(queries, responses, strict=True)])
            scores = reward(ids, torch.ones_like(ids)).logits[:, 0]
        stats = trainer.step(queries, responses, list(scores))
        update = stats["time/ppo/optimize_step"]
        rest = time.perf_counter() - sampled - update
        yield dict(zip(PHASES, (sampled - start, rest, update), strict=True))


def work(name: str, micro_batch: int) -> None:
    """Runs an iteration for each line of standard input, and prints its times as a line."""
    # What libraries print goes elsewhere.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def turn(figures: dict[str, float] | None) -> None:
        print(json.dumps(figures), file=out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)

    if name == "trl112":
        trl112(micro_batch, turn)
    iterations = {
        "ours": lambda: ours(micro_batch),
        "ours, shared trunk": lambda: ours(micro_batch, share_trunk=True),
        "trl0114": lambda: trl0114(micro_batch),
    }[name]()
    turn(None)
    for figures in iterations:
        turn(figures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trl112", metavar="PYTHON", help="interpreter that has TRL 1.12.0")
    parser.add_argument("--trl0114", metavar="PYTHON", help="interpreter that has TRL 0.11.4")
    parser.add_argument("--micro-batch", type=int, default=16, help="responses of one pass")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.micro_batch)
    pythons = {"ours": sys.executable, "ours, shared trunk": sys.executable}
    for name in ("trl112", "trl0114"):
        if getattr(args, name):
            pythons[name] = getattr(args, name)
        else:
            print(f"{name}: left out, no interpreter given (--{name} PYTHON)")
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    workers = {
        name: subprocess.Popen(
            [python, __file__, "--worker", name, "--micro-batch", str(args.micro_batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment
            | ({"PYTHONPATH": str(Path(__file__).parents[1])} if "ours" in name else {}),
        )
        for name, python in pythons.items()
    }
    figures = {name: [] for name in workers}
    for worker in workers.values():
        worker.stdout.readline()  # loaded
    for number in range(1 + args.rounds):
        for name, worker in workers.items():
            print(file=worker.stdin, flush=True)
            line = worker.stdout.readline()
            if not line:
                sys.exit(f"{name} failed: run {worker.args} for its message")
            if number:  # after a first round to warm up
                figures[name].append(json.loads(line))
    for worker in workers.values():
        worker.stdin.close()
    print(f"| seconds, median of {args.rounds} | {' | '.join(PHASES)} | iteration |")
    print("|---|" + "---:|" * (len(PHASES) + 1))
    for name, rounds in figures.items():
        medians = [statistics.median(each[phase] for each in rounds) for phase in PHASES]
        medians.append(statistics.median(sum(each.values()) for each in rounds))
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in medians)} |")


if __name__ == "__main__":
    main()
