"""The public names of rlhf, which are imported when they are asked for."""

import subprocess
import sys

import pytest

import rlhf
from tests import ROOT

NAMES = {
    *("train_sft", "train_reward", "train_ppo"),
    *("SFTConfig", "RewardConfig", "PPOConfig", "UserError"),
}


def test_all_public_names_are_there():
    assert set(rlhf.__all__) == NAMES and set(dir(rlhf)) >= NAMES
    for name in NAMES:
        assert getattr(rlhf, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'rlhf' has no attribute 'train'"):
        _ = rlhf.train


def test_an_import_imports_nothing_else():
    """A configuration needs no torch either."""
    program = (
        "import sys, rlhf\n"
        "dir(rlhf)\n"
        "assert not [x for x in sys.modules if x.startswith('rlhf.')]\n"
        "from rlhf import PPOConfig, UserError\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "from rlhf import *\n"
        "assert train_ppo is sys.modules['rlhf.ppo.train'].train_ppo\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


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
