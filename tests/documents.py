"""Blocks of code on a page, and scripts in examples/, run as they stand."""

import re
import runpy
import textwrap

from tests import ROOT


def blocks(page, language):
    """The fenced blocks of a language on a page."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


def execute(source, folder, monkeypatch):
    """Run in an empty folder; gives the names that the source defines."""
    monkeypatch.chdir(folder)
    names = {"__name__": "__main__"}
    exec(compile(source, "<document>", "exec"), names)
    return names


def run_example(name, folder, monkeypatch):
    """The names that examples/NAME defines, run as a script in an empty folder."""
    monkeypatch.chdir(folder)
    return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
