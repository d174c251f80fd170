"""Command line: `rlhf sft | reward | ppo | generate | evaluate | report | demo | config | env`."""

import argparse
import errno
import importlib
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import yaml

from rlhf.config.fields import Options, expand
from rlhf.config.inference import EvaluateConfig, GenerateConfig
from rlhf.config.parser import CommandParser, Parser, default, describe, is_required, sections
from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.errors import UserError
from rlhf.run.processes import world_size
from rlhf.run.signals import Stopped
from rlhf.run.terminal import complain, say

# GNU OpenMP's threads spin while they wait. On a machine with another busy process that makes small
# models tens of times slower, and asleep they cost next to nothing. It must be set before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Command(NamedTuple):
    """What a command runs, module:function, which is imported when its options are right, for torch
    takes seconds; a line of help; and its configuration, if it has one."""

    function: str
    about: str
    config: type[Options] | None = None


COMMANDS = {
    "sft": Command(
        "rlhf.sft:train_sft", "Supervised fine-tuning of a causal language model.", SFTConfig
    ),
    "reward": Command(
        "rlhf.reward_model:train_reward", "A reward model from preferences.", RewardConfig
    ),
    "ppo": Command("rlhf.ppo.train:train_ppo", "PPO of a policy against rewards.", PPOConfig),
    "generate": Command(
        "rlhf.inference.generate:run",
        "Completions of prompts by a model, in a JSONL file.",
        GenerateConfig,
    ),
    "evaluate": Command(
        "rlhf.inference.evaluate:run",
        "Two policies on the same prompts, compared by judges.",
        EvaluateConfig,
    ),
    "report": Command(
        "rlhf.report.page:main", "One self-contained HTML page of a run's or a demo's folder."
    ),
    "demo": Command(
        "rlhf.demo.command:main",
        "All stages on a small built-in task or a labelled file; counting; CartPole-v1.",
    ),
    "config": Command(
        "rlhf.cli:print_config", "Print a commented YAML file with every option of a command."
    ),
    "env": Command(
        "rlhf.report.env:main",
        "Versions, devices and backends: what to put into a bug report.",
    ),
}
STAGES = ("sft", "reward", "ppo")
CONFIGURED = [name for name, command in COMMANDS.items() if command.config is not None]
COLUMNS = 96


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for an error of the user, 128 + its number for
    a signal."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="rlhf",
        description=__doc__.splitlines()[0],
        epilog="\n".join(f"{name:8} {command.about}" for name, command in COMMANDS.items())
        + "\n\nOptions of a command: rlhf COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", choices=COMMANDS, nargs="?")
    given = parser.parse_args(argv[:1])
    if given.version:
        print(f"rlhf {importlib.import_module('ppo_kernels').__version__}")
        return 0
    if given.command is None:
        parser.print_help()
        return 0
    command = given.command
    if command in STAGES:
        run = run_stage
    elif command in CONFIGURED:
        run = run_configured
    else:
        run = print_config if command == "config" else run_module
    try:
        with quiet_writer_threads():
            return run(command, argv[1:])
    except UserError as error:
        complain(f"rlhf {command}: error: {error}", of_any_rank=not error.on_all_ranks)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        complain(
            f"rlhf {command}: error: {error}: {'free some space' if full else 'mend that'} and run "
            "it again (a stage goes on with --resume_from_checkpoint auto)",
            of_any_rank=True,
        )
        return 2
    except Stopped as stopped:
        return stopped.code
    except KeyboardInterrupt:
        complain(f"rlhf {command}: interrupted")
        return 130


@contextmanager
def quiet_writer_threads() -> Iterator[None]:
    """Keeps OSErrors of the threads that write for TensorBoard to themselves: they hand them on to
    the main thread, which tells them."""
    tell = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        writes = type(args.thread).__module__.startswith("tensorboard.")
        if not (writes and issubclass(args.exc_type, OSError)):
            tell(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = tell


def quiet_libraries() -> None:
    """Leaves it to us to say what is wrong with a model."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    importlib.import_module("huggingface_hub").logging.set_verbosity_error()


def load(command: str) -> Callable:
    """The function that a command runs."""
    module, _, function = COMMANDS[command].function.partition(":")
    return getattr(importlib.import_module(module), function)


def run_module(command: str, argv: list[str]) -> int:
    parser = Parser(prog=f"rlhf {command}", description=COMMANDS[command].about)
    check_one_process(command)
    quiet_libraries()
    run = load(command)
    sys.modules[run.__module__].add_arguments(parser)
    return run(parser.parse_args(argv))


def print_config(command: str, argv: list[str]) -> int:
    parser = Parser(prog=f"rlhf {command}", description=COMMANDS[command].about)
    parser.add_argument("command", choices=CONFIGURED)
    print(config_yaml(parser.parse_args(argv).command), end="")
    return 0


def run_configured(command: str, argv: list[str]) -> int:
    check_one_process(command)
    values = parse_config(command, argv)
    quiet_libraries()
    load(command)(values)
    return 0


def check_one_process(command: str) -> None:
    if world_size() > 1:
        raise UserError(
            f"{command} runs in one process: start it without torchrun", on_all_ranks=True
        )


def run_stage(stage: str, argv: list[str]) -> int:
    if world_size() == 1:
        stage_config = parse_config(stage, argv)
    distributed = importlib.import_module("rlhf.distributed")
    quiet_libraries()
    with distributed.session():
        if world_size() > 1:
            # torchrun ends all once one has ended: by itself another process might find what is
            # wrong, and end, before the main one could say so.
            stage_config = distributed.together(lambda: parse_config(stage, argv))
        metrics = load(stage)(stage_config)
        say(f"{stage_config.output_dir}: done in {metrics['seconds']:.0f} s")
    return 0


def parse_config(command: str, argv: list[str]) -> Options:
    """The command's configuration from `[--config FILE] [--key value ...]`; the latter wins."""
    _, about, config_class = COMMANDS[command]
    parser = CommandParser(command, config_class, about)
    file = parser.parse(argv)["config"]
    if file is not None:
        parser.set_defaults(**parser.read(Path(expand("config", file))))
    values = parser.parse(argv)
    del values["config"]
    missing = [f.name for f in fields(config_class) if is_required(f) and values[f.name] is None]
    if missing:
        raise UserError(
            f"missing {', '.join(f'--{name}' for name in missing)}: give them as options or in a "
            f"file with --config (rlhf config {command} prints one)"
        )
    if values.get("resume_from_checkpoint") in ("true", "True"):  # as transformers' trainer has it
        values["resume_from_checkpoint"] = "auto"
    return config_class(**values)


def config_yaml(command: str) -> str:
    """A file for --config that gives every option its default, under its help as a comment."""
    _, about, config_class = COMMANDS[command]
    text = f"# {about} Use: rlhf {command} --config FILE\n# null is as good as nothing.\n"
    for title, section in sections(config_class).items():
        text += "\n\n" + f"# {title} ".ljust(COLUMNS, "-") + "\n"
        for field in section:
            comment = textwrap.wrap(
                describe(field), COLUMNS, initial_indent="# ", subsequent_indent="# "
            )
            text += "\n" + "\n".join(comment) + "\n" + yaml.safe_dump({field.name: default(field)})
    return text
