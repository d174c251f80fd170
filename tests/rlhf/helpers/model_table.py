"""`python -m tests.rlhf.helpers.model_table --output FILE.md`: every causal class of transformers
as a tiny model through the stages of `rlhf`, one row a class.

A cell is `yes`; or `refused`, by one line that the user can read; or a fault: a traceback, a wrong
result, a warning, or a process that died or hung. Faults and refusals stand below the table, those
that are the same together. Exit code 1 if there is a fault.
"""

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from io import BytesIO
from pathlib import Path
from unittest.mock import MagicMock, patch

import torch
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import rlhf.inference.generate
from rlhf.config.inference import GenerateConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.demo.base import write_jsonl
from rlhf.errors import UserError, one_line
from rlhf.models.weights import quiet, restore_padding
from rlhf.ppo.train import train_ppo
from rlhf.reward_model import train_reward
from rlhf.sft import train_sft
from tests.rlhf.helpers.tiny_models import NOT_BUILT, make_model, model_types
from tests.rlhf.helpers.world import BAD, GOOD, WORDS, make_tokenizer

COLUMNS = ("samples", "sft", "reward", "ppo", "ratio", "kl", "resumes", "reopens", "silent")
OPENINGS = ("film", "plot is", "film is good . plot", "is", "plot is bad film", ". . .", "great")
LENGTH = 12
# Advice to install a faster kernel is no fault of the run, nor is a mask that only padding needs.
HARMLESS = (
    "is falling back to its reference PyTorch implementation because",
    "`attention_mask` was passed, but it is unused in this model.",
)
# Of the first iteration, where policy and reference are the same: rounding only.
LIMITS = {"ratio": 1e-4, "kl": 1e-5}


class Fault(Exception):
    """Something promised that does not hold."""


class Row:
    """What became of one class: by column `yes`, `refused: ...` or `fault: ...`."""

    def __init__(self, model_type: str):
        self.cells = {"type": model_type}

    @contextmanager
    def cell(self, column: str) -> Iterator[None]:
        try:
            yield
            self.cells.setdefault(column, "yes")
        except UserError as error:
            self.cells[column] = f"refused: {error}"
        except Fault as error:
            self.cells[column] = f"fault: {error}"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.name}"
            self.cells[column] = f"fault: {one_line(error)} in {where}"


def score(completions: list[str], **columns: object) -> list[float]:
    """The share of good words, and a little for length, so that the advantages differ."""
    words = [completion.split() for completion in completions]
    return [sum(word in GOOD for word in text) + 0.1 * len(text) for text in words]


def write_data(folder: Path) -> None:
    texts = [f"{opening} {' '.join(GOOD[: i % 3 + 1])} ." for i, opening in enumerate(OPENINGS * 2)]
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts])
    pairs = [
        {"prompt": opening, "chosen": f" {good} .", "rejected": f" {bad} {bad} ."}
        for opening, good, bad in zip(OPENINGS, GOOD * 3, BAD * 3, strict=False)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": opening} for opening in OPENINGS])


@contextmanager
def warnings_into(messages: list[str]) -> Iterator[None]:
    """Collects the warnings of Python and those that transformers logs."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = transformers.logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield
    finally:
        logger.removeHandler(handler)
    messages += [str(warning.message) for warning in caught]
    messages[:] = [x for x in messages if not any(text in x for text in HARMLESS)]


def check_samples(model: PreTrainedModel, folder: Path, data: Path) -> None:
    """All but greedy completions, of prompts of unequal lengths and with unequal longest lengths,
    must be those that the model's own `generate` gives each prompt."""
    config = GenerateConfig(
        model_name_or_path=str(folder),
        dataset_name=str(data / "prompts.jsonl"),
        output_file=str(folder.parent / "answers.jsonl"),
        response_length=LENGTH,
        sample_response_length=True,
        temperature=1e-5,
    )
    rows = rlhf.inference.generate.run(config)
    if len({row["tokens"] for row in rows}) <= 2:
        raise Fault("all completions are of one length: the rows that end early are not tried")
    tokenizer = make_tokenizer()
    for row in rows:
        inputs = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode(), quiet():
            ids = model.generate(**inputs, max_new_tokens=row["tokens"], do_sample=False)
        own = ids[0, inputs.input_ids.shape[1] :]
        text = tokenizer.decode(own, skip_special_tokens=True)
        # A completion begins with the space that sets it off from its prompt.
        if (row["completion"].removeprefix(" "), row["tokens"]) != (text, len(own)):
            raise Fault(
                "samples otherwise than its own generate: "
                f"{row['prompt']!r} -> {row['completion']!r}, there {text!r}"
            )


@contextmanager
def without_plots() -> Iterator[None]:
    """Leaves empty files in place of plots, which would take half of the time."""

    def panels(figure: Figure, rows: int, columns: int, **options: object) -> list[list[MagicMock]]:
        return [[MagicMock()] * columns] * rows

    def save(figure: Figure, file: BytesIO, **options: object) -> None:
        file.write(b"")

    with patch.object(Figure, "subplots", panels), patch.object(Figure, "savefig", save):
        yield


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(3, len(WORDS))[None]
    with torch.inference_mode():
        return model.eval()(input_ids=ids, use_cache=False).logits


@contextmanager
def trained_instance(kind: type[nn.Module]) -> Iterator[list[nn.Module]]:
    """Collects the instances of this class that run with weights that are trained."""
    found: list[nn.Module] = []

    def note(module: nn.Module, *_: object) -> None:
        if type(module) is kind and any(p.requires_grad for p in module.parameters()):
            found[:] = [module]

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        yield found
    finally:
        hook.remove()


def check_reopens(trained: PreTrainedModel, folder: Path) -> None:
    again, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    line = restore_padding(again, folder)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise Fault(f"saved with {kind.replace('_', ' ')}: {sorted(loading[kind])[0]}")
    if not same(again.state_dict(), trained.state_dict()):
        raise Fault("the saved model has other weights than the trained one")
    # The same weights at other addresses are rounded otherwise.
    if not torch.allclose(logits(again), logits(trained), rtol=0, atol=1e-5):
        raise Fault("the saved model gives other logits than the trained one")
    if line is not None:  # which a run says too
        raise UserError(line)


def first_metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def try_class(model_type: str, work: Path) -> dict[str, str]:
    """A row of the table; `work` is an empty folder."""
    row, messages = Row(model_type), []
    with row.cell("builds"):
        model = make_model(model_type, len(WORDS))
        parameters = signature(type(model).forward).parameters
        cache = [
            x for x in ("cache", "past_key_values", "cache_params", "state") if x in parameters
        ]
        row.cells |= {"class": type(model).__name__, "cache": ", ".join(cache) or "none"}
        policy = work / "policy"
        model.save_pretrained(policy)
        make_tokenizer().save_pretrained(policy)
        check_reopens(model, policy)
    if row.cells["builds"] != "yes":
        return row.cells
    write_data(work)
    with row.cell("silent"), warnings_into(messages), without_plots():
        run_stages(row, model, policy, work)
    said = dict.fromkeys(" ".join(message.split())[:200] for message in messages)
    if said:
        row.cells["silent"] = "fault: " + " ¶ ".join(said)
    return {name: cell.replace(str(work), "WORK") for name, cell in row.cells.items()}


def run_stages(row: Row, model: PreTrainedModel, policy: Path, work: Path) -> None:
    with row.cell("samples"):
        check_samples(model, policy, work)

    common = {
        "model_name_or_path": str(policy),
        "per_device_train_batch_size": 7,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
    }

    def stage(column: str, train: Callable, config: type, data: str) -> None:
        with row.cell(column):
            out = work / column
            paths = {"dataset_name": str(work / data), "output_dir": str(out)}
            train(config(**common | paths, max_steps=2, save_steps=0))
            if same(weights(out), weights(policy)):
                raise Fault("no weight has moved")

    stage("sft", train_sft, SFTConfig, "texts.jsonl")
    stage("reward", train_reward, RewardConfig, "pairs.jsonl")
    run_ppo(row, model, common, work)


def run_ppo(row: Row, model: PreTrainedModel, common: dict, work: Path) -> None:
    """Two iterations with the reward model, if there is one; the second of them resumed; and one
    that goes on from what was saved."""
    rewards = [score] + ([str(work / "reward")] if row.cells["reward"] == "yes" else [])

    def run(name: str, **changes: object) -> Path:
        config = common | {
            "dataset_name": str(work / "prompts.jsonl"),
            "output_dir": str(work / name),
            "response_length": LENGTH,
            "sample_response_length": True,
            "total_episodes": 2 * 14,
            "num_mini_batches": 2,
            "num_ppo_epochs": 1,
            "save_steps": 1,
            "save_total_limit": 0,
        }
        train_ppo(PPOConfig(**config | changes), rewards)
        return work / name

    with row.cell("ppo"), trained_instance(type(model)) as trained:
        out = run("ppo")
        if same(weights(out), weights(work / "policy")):
            raise Fault("no weight has moved")
    if row.cells["ppo"] != "yes":
        return
    first = first_metrics(out)
    for column, metric in (("ratio", "policy/first_ratio_error"), ("kl", "objective/kl")):
        with row.cell(column):
            if not abs(first[metric]) <= LIMITS[column]:
                raise Fault(f"{metric} of the first iteration is {first[metric]:.1e}")
    with row.cell("resumes"):
        resumed = run("resumed", resume_from_checkpoint=str(out / "checkpoint-1"))
        for part in ("", "critic"):
            if not same(weights(out / part), weights(resumed / part)):
                raise Fault(f"{part or 'policy'} is another after resuming")
    with row.cell("reopens"):
        check_reopens(trained[0], out)
        changes = {"model_name_or_path": str(out), "critic_model_path": str(out / "critic")}
        run("again", **changes, total_episodes=14, save_steps=0)


def try_in_process(model_type: str, limit: float) -> dict[str, str]:
    """`try_class` in a process of its own, which is ended after `limit` seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def target() -> None:
        with tempfile.TemporaryDirectory() as work, open(Path(work, "log"), "w") as log:
            sys.stdout = sys.stderr = log
            sender.send(try_class(model_type, Path(work)))

    process = context.Process(target=target)
    process.start()
    sender.close()
    try:
        done = receiver.poll(limit)
        return receiver.recv() if done else {"type": model_type, "builds": "fault: hangs"}
    except EOFError:
        process.join()
        return {"type": model_type, "builds": f"fault: dies with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def as_markdown(rows: list[dict[str, str]]) -> str:
    head = ("type", "class", "cache", "builds", *COLUMNS)
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(row.get(x, "").split(":")[0] for x in head) for row in rows]
    said = defaultdict(list)
    for row in rows:
        for column in ("builds", *COLUMNS):
            kind, _, messages = row.get(column, "").partition(": ")
            for message in filter(None, messages.split(" ¶ ")):
                said[kind, column, message].append(row["type"])
    order = sorted(said.items(), key=lambda item: (item[0][0], item[0][1], -len(item[1])))
    parts = [
        f"- {kind} · {column} · {message}\n  ({len(names)}) {', '.join(names)}"
        for (kind, column, message), names in order
    ]
    skipped = [f"- not built · {name} · {reason}" for name, reason in NOT_BUILT.items()]
    return "\n".join([f"transformers {transformers.__version__}", "", *lines, "", *parts, *skipped])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", nargs="+", help="model types (default: all)")
    parser.add_argument("--output", type=Path, help="Markdown file (default: the terminal)")
    parser.add_argument("--seconds", type=float, default=120, help="of a class at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model_type in args.classes or model_types():
        rows.append(try_in_process(model_type, args.seconds))
        print(json.dumps(rows[-1]), flush=True)
    page = as_markdown(rows)
    args.output.write_text(page + "\n") if args.output else print(page)
    return int(any("fault" in cell for row in rows for cell in row.values()))


if __name__ == "__main__":
    sys.exit(main())
