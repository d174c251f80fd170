"""Examples with other packages, executed as written: the ops run in their place. And the table of
TRL's options."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest

from ppo_kernels import integrations
from tests import ROOT
from tests.documents import blocks, run_example

INTEGRATIONS, MIGRATION = ROOT / "docs" / "integrations.md", ROOT / "docs" / "migration.md"


def counted(monkeypatch, peer, *names):
    """Calls that `peer`'s functions make of these ops."""
    calls = []
    module = getattr(integrations, peer)
    for name in names:
        op = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *x, n=name, f=op, **k: calls.append(n) or f(*x, **k)
        )
    return calls


def test_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    from tests.peers.test_trl_trainers import OPS

    calls = counted(monkeypatch, "trl", *OPS)
    trainer = run_example("trl_grpo.py", tmp_path, monkeypatch)["trainer"]
    assert trainer.state.global_step == 3
    assert len(calls) >= 3


def test_verl(tmp_path, monkeypatch):
    pytest.importorskip("verl", reason="verl is not installed")
    calls = counted(monkeypatch, "verl", "token_logprobs", "gae", "entropy")
    names = run_example("verl_functions.py", tmp_path, monkeypatch)
    assert calls == ["gae", "token_logprobs", "entropy"]
    gradient = names["logits"].grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_verl_in_workers(tmp_path):
    pytest.importorskip("verl", reason="verl is not installed")
    (worker,) = (x for x in blocks(INTEGRATIONS, "python") if 'patch("verl")' in x)
    (tmp_path / "use_ppo_kernels.py").write_text(worker)
    code = (
        "import verl, gc; gc.collect(); from verl.trainer.ppo import core_algos as c;"
        "print(c.compute_gae_advantage_return.__module__, c.verl_F.logprobs_from_logits.__module__)"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {"VERL_USE_EXTERNAL_MODULES": "use_ppo_kernels", "PYTHONPATH": path}
    output = subprocess.check_output(
        [sys.executable, "-c", code], env=os.environ | environment, text=True
    )
    assert output.split()[-2:] == 2 * ["ppo_kernels.integrations.verl"]


def test_every_option_of_trls_ppo_is_in_the_table():
    """Those that TRL's PPO added to transformers' TrainingArguments."""
    ppo = pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO trainer")
    from transformers import TrainingArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    theirs = {field.name for field in dataclasses.fields(ppo.PPOConfig)} - inherited
    table = MIGRATION.read_text().partition("## TRL 0.12 to 1.12")[2]
    cells = re.findall(r"^\| ([^|]*)", table, flags=re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(cells)))
    assert theirs <= named, theirs - named
