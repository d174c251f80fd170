"""The command line: `rlhf sft | reward | ppo | demo`."""

import argparse
import difflib
import importlib
import os
import sys
from dataclasses import fields
from pathlib import Path

# GNU OpenMP's threads spin while they wait. On a machine with another busy process that makes small
# models tens of times slower, and asleep they cost next to nothing. It must be set before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from rlhf import config
from rlhf.errors import UserError

STAGES = {
    "sft": (config.SFTConfig, "supervised fine-tuning of a causal language model"),
    "reward": (config.RewardConfig, "a reward model from preferences"),
    "ppo": (config.PPOConfig, "PPO of a policy against a reward model"),
}
DEMO = "all three stages on a small built-in task, or on a labelled text file"


class OptionFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option; a default only where there is one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[0]

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default is None else super()._get_help_string(action)


class StageParser(HfArgumentParser):
    """Options from a stage's dataclass; a wrong one raises UserError with a single line."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for an error of the user, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {name: text for name, (_, text) in STAGES.items()} | {"demo": DEMO}
    parser = argparse.ArgumentParser(
        prog="rlhf",
        description=__doc__,
        epilog="\n".join(f"{name:8} {text}" for name, text in commands.items())
        + "\n\nOptions of a command: rlhf COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands)
    command = parser.parse_args(argv[:1]).command
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if command == "demo":
            return run_demo(argv[1:])
        return run_stage(command, argv[1:])
    except UserError as error:
        print(f"rlhf {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rlhf {command}: interrupted", file=sys.stderr)
        return 130


def run_demo(argv: list[str]) -> int:
    demo = importlib.import_module("rlhf.demo")
    parser = argparse.ArgumentParser(prog="rlhf demo", description=DEMO)
    demo.add_arguments(parser)
    return demo.main(parser.parse_args(argv))


def run_stage(stage: str, argv: list[str]) -> int:
    stage_config = parse_config(stage, argv)
    train = getattr(importlib.import_module(f"rlhf.{stage}"), f"train_{stage}")
    metrics = train(stage_config)
    print(f"{stage_config.output_dir}: done in {metrics['seconds']:.0f} s")
    return 0


def parse_config(stage: str, argv: list[str]) -> config.TrainConfig:
    """The stage's configuration from `[FILE.yaml] [--key value ...]`; the latter wins."""
    config_class, description = STAGES[stage]
    parser = StageParser(
        config_class,
        prog=f"rlhf {stage}",
        usage=f"rlhf {stage} [FILE.yaml] [--key value ...]",
        description=f"{description}; the file holds lines 'key: value' with the same keys",
        formatter_class=OptionFormatter,
        allow_abbrev=False,
    )
    if argv and not argv[0].startswith("-"):
        argv = read_yaml(Path(argv[0])) + argv[1:]
    names = [field.name for field in fields(config_class)]
    for option in argv:
        name = option.removeprefix("--").split("=")[0].replace("-", "_")
        if option.startswith("--") and name.removeprefix("no_") not in (*names, "help"):
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean --{nearest[0]}?" if nearest else f"see {parser.prog} --help"
            raise UserError(f"unknown option {option}: {hint}")
    return config_class(**vars(parser.parse_args(argv)))


def read_yaml(path: Path) -> list[str]:
    """A flat YAML file as command-line options."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold lines 'key: value', got {values!r:.60}")
    options = []
    for key, value in values.items():
        if value is not None:
            options += [f"--{key}", str(value)]
    return options
