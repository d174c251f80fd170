"""The trainer without the packages that it needs, which the extra `rlhf` brings."""

import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

from rlhf.errors import EXTRA
from tests import ROOT

HOW_TO_INSTALL = 'the trainer needs transformers: pip install "ppo-kernels[rlhf]"'
WITHOUT = "import runpy, sys; sys.modules['transformers'] = None; "


def run(program):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, cwd=ROOT
    )


def test_the_command_says_in_one_line_what_to_type():
    result = run("sys.argv = ['rlhf', 'env']; runpy.run_module('rlhf', run_name='__main__')")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"rlhf: error: {HOW_TO_INSTALL}\n"


def test_so_does_the_import_of_a_name():
    result = run("from rlhf import train_sft")
    assert result.stderr.splitlines()[-1] == f"ModuleNotFoundError: {HOW_TO_INSTALL}"


def test_other_modules_that_are_missing_are_named_as_ever():
    result = run("import rlhf.errors as e; raise e.of_the_extra(ModuleNotFoundError(name='mine'))")
    assert "pip install" not in result.stderr


def test_what_is_looked_for_is_what_the_extra_brings():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    distributions = packages_distributions()
    brought = {x.partition(">")[0].lower() for x in extras["rlhf"]}
    assert {distributions[name][0].lower() for name in EXTRA} == brought
