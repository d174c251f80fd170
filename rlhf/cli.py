"""The command line: `rlhf sft | reward | ppo | generate | evaluate | report | demo | config`."""

import argparse
import difflib
import errno
import importlib
import os
import re
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import MISSING, Field, fields
from pathlib import Path

# GNU OpenMP's threads spin while they wait. On a machine with another busy process that makes small
# models tens of times slower, and asleep they cost next to nothing. It must be set before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import huggingface_hub
import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from rlhf import config
from rlhf.errors import UserError
from rlhf.options import SECTIONS, Options

STAGES = {
    "sft": (config.SFTConfig, "Supervised fine-tuning of a causal language model."),
    "reward": (config.RewardConfig, "A reward model from preferences."),
    "ppo": (config.PPOConfig, "PPO of a policy against rewards."),
}
CONFIGURED = STAGES | {
    "generate": (config.GenerateConfig, "Completions of prompts by a model, in a JSONL file."),
    "evaluate": (config.EvaluateConfig, "Two policies on the same prompts, compared by judges."),
}
OTHERS = {
    "report": "One self-contained HTML page of a run's or a demo's folder.",
    "demo": "All stages on a small built-in task or a labelled file; counting; CartPole-v1.",
    "config": "Print a commented YAML file with every option of a command.",
}
COLUMNS = 96


class TextLoader(yaml.BaseLoader):
    """Leaves every value but null as the text that was written: 1e-5 and `no` are strings, which
    the type of their option then reads as on the command line. A key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.MarkedYAMLError(f"key {key.value!r} is given twice", key.start_mark)
            keys.add(key.value)
        return mapping


NULL = "tag:yaml.org,2002:null"
TextLoader.add_implicit_resolver(NULL, re.compile("(~|null|Null|NULL)?$"), ["~", "n", "N", ""])
TextLoader.add_constructor(NULL, lambda loader, node: None)


class OptionFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option; a default only where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def add_argument(self, action: argparse.Action) -> None:
        if not action.option_strings[0].startswith("--no_"):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[0] + (" ..." if action.nargs == "+" else "")

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Collect(argparse.Action):
    """Stores a value; a list option that is given again adds to what it was given before."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest)
        if self.nargs == "+" and before is not self.default:
            values = [*before, *values]
        setattr(namespace, self.dest, values)


class CommandParser(HfArgumentParser):
    """The options of a command, under the headings of their sections; a wrong one raises UserError.

    Required ones may be given by a file instead, so that to argparse their default is None.
    """

    def __init__(self, command: str):
        config_class, description = CONFIGURED[command]
        super().__init__(
            config_class,
            prog=f"rlhf {command}",
            usage=f"rlhf {command} [--config FILE] [--key value ...]",
            description=description,
            epilog="A switch takes true or false; --no_NAME is --NAME false.",
            formatter_class=OptionFormatter,
            allow_abbrev=False,
        )
        self.names = [field.name for field in fields(config_class)]
        self.add_argument(
            "--config",
            help=f"YAML file with lines 'key: value' of these options, which the command line "
            f"overrides; null is as good as nothing. rlhf config {command} prints one.",
        )

    def parse(self, argv: list[str]) -> dict[str, object]:
        """The value of every option."""
        for option in argv:
            spelling = option.split("=")[0]
            if option.startswith("--") and spelling not in self._option_string_actions:
                name = spelling.removeprefix("--").replace("-", "_")
                raise UserError(f"unknown option {spelling}: {self._hint(name, '--{}')}")
        values, rest = self.parse_known_args(argv)
        if rest:
            self.error(
                f"unexpected argument {rest[0]!r}: give options as --key value, and a file "
                "as --config FILE"
            )
        return vars(values)

    def read(self, path: Path) -> dict[str, object]:
        """The values that a flat YAML file gives."""
        values = {}
        for key, value in read_yaml(path).items():
            if key not in self.names:
                hint = self._hint(str(key), "{!r}")
                raise UserError(f"{path}: unknown key {key!r}: {hint}")
            if value is not None:
                try:
                    values[key] = self._convert(key, value)
                except (ValueError, argparse.ArgumentTypeError) as error:
                    raise UserError(f"{path}: {key}: {error}") from error
        return values

    def _convert(self, name: str, value: str | list | dict) -> object:
        """A value of a file as the type of its option."""
        action = self._option_string_actions[f"--{name}"]
        is_list = action.nargs == "+"
        items = value if is_list and isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            kind = "a list of plain values" if is_list else "a plain value"
            raise ValueError(f"must be {kind}, got {value!r:.60}")
        converted = [action.type(item) for item in items]
        return converted if is_list else converted[0]

    def _hint(self, name: str, form: str) -> str:
        nearest = difflib.get_close_matches(name, self.names, n=1)
        return f"did you mean {form.format(*nearest)}?" if nearest else f"see {self.prog} --help"

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")

    def _add_dataclass_arguments(self, config_class: type) -> None:
        self.register("action", None, Collect)
        for title, section in sections(config_class).items():
            group = self.add_argument_group(title)
            for field in section:
                option = copy(field)
                option.metadata = {"help": describe(field)}
                if is_required(field):
                    option.default = None
                self._parse_dataclass_field(group, option)

    def _parse_optional(self, argument: str):
        """What begins with a single '-' is a value: -1e-3 as well as -1."""
        if argument.startswith("--") or argument == "-h":
            return super()._parse_optional(argument)
        return None


def sections(config_class: type) -> dict[str, list[Field]]:
    """The fields of a configuration by the heading they stand under."""
    grouped = {title: [] for title in SECTIONS}
    for field in fields(config_class):
        grouped[field.metadata["section"]].append(field)
    return {title: section for title, section in grouped.items() if section}


def is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def default(field: Field) -> object:
    """The field's default; None for a required one."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def describe(field: Field) -> str:
    return field.metadata["help"] + (" (required)" if is_required(field) else "")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for an error of the user, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {name: text for name, (_, text) in CONFIGURED.items()} | OTHERS
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
    huggingface_hub.logging.set_verbosity_error()
    if command in STAGES:
        run = run_stage
    elif command in CONFIGURED:
        run = run_configured
    else:
        run = run_config if command == "config" else run_module
    try:
        with quiet_threads():
            return run(command, argv[1:])
    except UserError as error:
        complain(f"rlhf {command}: error: {error}")
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        complain(
            f"rlhf {command}: error: {error}: {'free some space' if full else 'mend that'} and run "
            "it again (a stage goes on with --resume_from_checkpoint auto)"
        )
        return 2
    except KeyboardInterrupt:
        complain(f"rlhf {command}: interrupted")
        return 130


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Keeps OSErrors of threads to themselves: the one that writes for TensorBoard hands them on to
    the main thread."""
    tell = threading.excepthook
    threading.excepthook = lambda args: issubclass(args.exc_type, OSError) or tell(args)
    try:
        yield
    finally:
        threading.excepthook = tell


def complain(message: str) -> None:
    """Prints one line to stderr, from one of the processes."""
    from rlhf import distributed  # imports torch, which help need not wait for

    if distributed.is_main():
        print(" ".join(message.splitlines()), file=sys.stderr)


def run_module(command: str, argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"rlhf {command}", description=OTHERS[command])
    check_one_process(command)
    module = importlib.import_module(f"rlhf.{command}")
    module.add_arguments(parser)
    return module.main(parser.parse_args(argv))


def run_config(command: str, argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"rlhf {command}", description=OTHERS[command])
    parser.add_argument("command", choices=CONFIGURED)
    print(config_yaml(parser.parse_args(argv).command), end="")
    return 0


def run_configured(command: str, argv: list[str]) -> int:
    check_one_process(command)
    values = parse_config(command, argv)
    importlib.import_module(f"rlhf.{command}").run(values)
    return 0


def check_one_process(command: str) -> None:
    if importlib.import_module("rlhf.distributed").world_size() > 1:
        raise UserError(f"{command} runs in one process: start it without torchrun")


def run_stage(stage: str, argv: list[str]) -> int:
    distributed = importlib.import_module("rlhf.distributed")
    with distributed.session():
        # torchrun ends all once one has ended: by itself another process might find what is wrong,
        # and end, before the main one could say so.
        stage_config = distributed.together(lambda: parse_config(stage, argv))
        train = getattr(importlib.import_module(f"rlhf.{stage}"), f"train_{stage}")
        metrics = train(stage_config)
        if distributed.is_main():
            print(f"{stage_config.output_dir}: done in {metrics['seconds']:.0f} s")
    return 0


def parse_config(command: str, argv: list[str]) -> Options:
    """The command's configuration from `[--config FILE] [--key value ...]`; the latter wins."""
    parser = CommandParser(command)
    file = parser.parse(argv)["config"]
    if file is not None:
        parser.set_defaults(**parser.read(Path(file)))
    values = parser.parse(argv)
    del values["config"]
    config_class, _ = CONFIGURED[command]
    missing = [f.name for f in fields(config_class) if is_required(f) and values[f.name] is None]
    if missing:
        raise UserError(
            f"missing {', '.join(f'--{name}' for name in missing)}: give them as options or in a "
            f"file with --config (rlhf config {command} prints one)"
        )
    if values.get("resume_from_checkpoint") in ("true", "True"):  # as transformers' trainer has it
        values["resume_from_checkpoint"] = "auto"
    return config_class(**values)


def read_yaml(path: Path) -> dict:
    """A YAML file of 'key: value', whose values are text, None, or lists or dicts of these."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), TextLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold lines 'key: value', got {values!r:.60}")
    return values


def config_yaml(command: str) -> str:
    """A file for --config that gives every option its default, under its help as a comment."""
    config_class, description = CONFIGURED[command]
    text = f"# {description} Use: rlhf {command} --config FILE\n# null is as good as nothing.\n"
    for title, section in sections(config_class).items():
        text += "\n\n" + f"# {title} ".ljust(COLUMNS, "-") + "\n"
        for field in section:
            comment = textwrap.wrap(
                describe(field), COLUMNS, initial_indent="# ", subsequent_indent="# "
            )
            text += "\n" + "\n".join(comment) + "\n" + yaml.safe_dump({field.name: default(field)})
    return text
