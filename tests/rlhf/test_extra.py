"""The trainer without the packages that it needs, which the extra `rlhf` brings."""

import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

import rlhf
from tests import ROOT

HOW_TO_INSTALL = 'the trainer needs transformers, yaml: pip install "ppo-kernels[rlhf]"'
WITHOUT = "import runpy, sys; sys.modules['transformers'] = sys.modules['yaml'] = None; "


def run(program):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("argv", (["rlhf", "sft"], ["rlhf", "--help"]))
def test_the_command_says_in_one_line_what_to_type(argv):
    result = run(f"sys.argv = {argv}; runpy.run_module('rlhf', run_name='__main__')")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"rlhf: error: {HOW_TO_INSTALL}\n"


@pytest.mark.parametrize("module", ("rlhf.sft", "rlhf.cli", "rlhf.classic"))
def test_so_does_the_import_of_a_module(module):
    result = run(f"import rlhf, {module}")
    assert result.stderr.splitlines()[-1] == f"ImportError: {HOW_TO_INSTALL}"


def test_others_may_look_for_the_packages():
    """Nobody's imports but ours are refused."""
    result = run(
        "import rlhf, importlib.util; assert importlib.util.find_spec('transformers') is None; "
        "import json, torch"
    )
    assert result.returncode == 0, result.stderr


def test_what_is_looked_for_is_what_the_extra_brings():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    distributions = packages_distributions()
    brought = {x.partition(">")[0].lower() for x in extras["rlhf"]}
    assert {distributions[name][0].lower() for name in rlhf.PACKAGES} == brought
