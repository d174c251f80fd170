"""The public face of the trainer, `rlhf`: as Python and as a type checker see it."""

import subprocess
import sys

import pytest

import rlhf
from tests import ROOT


def test_every_name_is_what_its_module_says():
    assert set(rlhf.__all__) == set(rlhf._MODULES) <= set(dir(rlhf))
    for name in rlhf.__all__:
        assert getattr(rlhf, name).__name__ == name


@pytest.mark.slow
def test_names_have_their_types(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    names = ", ".join(rlhf.__all__)
    program = tmp_path / "program.py"
    program.write_text(
        f"from rlhf import {names}\n"
        "config: PPOConfig = PPOConfig(output_dir='runs/ppo')\n"
        "train_ppo(config)\n"
    )
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file", "/dev/null"),
            *("--follow-imports=silent", "--ignore-missing-imports"),
            *("--cache-dir", str(tmp_path), str(program)),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout
