"""YAML of 'key: value'. A key given twice is an error, and so is an alias: a few lines of aliases
of aliases would stand for more values than any memory holds."""

import re
from pathlib import Path

import yaml

from rlhf.errors import UserError


class _Plain:
    """Refuses aliases and keys given twice, for a loader that comes after it."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{event.anchor} is refused: write out what it stands for",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.MarkedYAMLError(f"key {key.value!r} is given twice", key.start_mark)
            keys.add(key.value)
        return mapping


class PlainLoader(_Plain, yaml.SafeLoader):
    """Values of YAML's own types, as `yaml.safe_dump` wrote them."""


class TextLoader(_Plain, yaml.BaseLoader):
    """Leaves every value but null as the text that was written: 1e-5 and `no` are strings, which
    the type of their option then reads as on the command line."""


NULL = "tag:yaml.org,2002:null"
TextLoader.add_implicit_resolver(NULL, re.compile("(~|null|Null|NULL)?$"), ["~", "n", "N", ""])
TextLoader.add_constructor(NULL, lambda loader, node: None)


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
