"""Command-line options from the fields of a configuration, and their values from a YAML file.

It does what `transformers.HfArgumentParser` would, whose import a `--help` had to wait for.
"""

import argparse
import difflib
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin

from rlhf.config.fields import SECTIONS
from rlhf.config.yaml_files import read_yaml
from rlhf.errors import UserError, quote
from rlhf.run.terminal import printable

SWITCHES = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


class Parser(argparse.ArgumentParser):
    """What it prints, a user's words among it, does not speak to the terminal."""

    def _print_message(self, message: str, file=None) -> None:
        super()._print_message(printable(message), file)


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


class CommandParser(Parser):
    """The options of a command, under the headings of their sections; a wrong one raises UserError.

    Required ones may be given by a file instead, so that to argparse their default is None.
    """

    def __init__(self, command: str, config_class: type, description: str):
        super().__init__(
            prog=f"rlhf {command}",
            usage=f"rlhf {command} [--config FILE] [--key value ...]",
            description=description,
            epilog="A switch takes true or false; --no_NAME is --NAME false.",
            formatter_class=OptionFormatter,
            allow_abbrev=False,
        )
        self.names = [field.name for field in fields(config_class)]
        self.register("action", None, Collect)
        for title, section in sections(config_class).items():
            group = self.add_argument_group(title)
            for field in section:
                _add_option(group, field)
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
                f"unexpected argument {quote(rest[0])}: give options as --key value, and a file "
                "as --config FILE"
            )
        return vars(values)

    def read(self, path: Path) -> dict[str, object]:
        """The values that a flat YAML file gives."""
        values = {}
        for key, value in read_yaml(path).items():
            if key not in self.names:
                hint = self._hint(str(key), "{!r}")
                raise UserError(f"{path}: unknown key {quote(key)}: {hint}")
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
            raise ValueError(f"must be {kind}, got {quote(value)}")
        converted = [action.type(item) for item in items]
        return converted if is_list else converted[0]

    def _hint(self, name: str, form: str) -> str:
        nearest = difflib.get_close_matches(name[:100], self.names, n=1)
        return f"did you mean {form.format(*nearest)}?" if nearest else f"see {self.prog} --help"

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")

    def _parse_optional(self, argument: str):
        """What begins with a single '-' is a value: -1e-3 as well as -1."""
        if argument.startswith("--") or argument == "-h":
            return super()._parse_optional(argument)
        return None


def _add_option(group, field: Field) -> None:
    """Adds `--name`, and `--no_name` of a switch that is on by default; both also with hyphens."""
    kind, options = field.type, {}
    if isinstance(kind, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        options["nargs"] = "+"
    if kind is bool:
        kind = switch
        options |= {"nargs": "?", "const": True}
    add = partial(group.add_argument, dest=field.name, default=default(field))
    add(*spellings(field.name), type=kind, help=describe(field), **options)
    if field.type is bool and field.default is True:
        add(*spellings(f"no_{field.name}"), action="store_false")


def spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def switch(value: str) -> bool:
    """The meaning of a switch's value."""
    if value.lower() not in SWITCHES:
        raise argparse.ArgumentTypeError(f"must be true or false, got {quote(value)}")
    return SWITCHES[value.lower()]


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
