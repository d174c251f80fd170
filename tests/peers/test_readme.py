"""README's examples with other packages, executed as written."""

import os
import subprocess
import sys

import pytest

from ppo_kernels import integrations
from tests.test_readme import README, examples, execute

TRL, VERL, WORKER = examples("Drop it into TRL, verl")


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
    trainer = execute(TRL, tmp_path, monkeypatch)["trainer"]
    assert trainer.state.global_step == 3
    assert len(calls) >= 3


def test_verl(tmp_path, monkeypatch):
    pytest.importorskip("verl", reason="verl is not installed")
    calls = counted(monkeypatch, "verl", "token_logprobs", "gae", "entropy")
    names = execute(VERL, tmp_path, monkeypatch)
    assert calls == ["gae", "token_logprobs", "entropy"]
    gradient = names["logits"].grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_verl_in_workers(tmp_path):
    pytest.importorskip("verl", reason="verl is not installed")
    (tmp_path / "use_ppo_kernels.py").write_text(WORKER)
    code = (
        "import verl, gc; gc.collect(); from verl.trainer.ppo import core_algos as c;"
        "print(c.compute_gae_advantage_return.__module__, c.verl_F.logprobs_from_logits.__module__)"
    )
    path = os.pathsep.join([str(tmp_path), str(README.parent)])
    environment = {"VERL_USE_EXTERNAL_MODULES": "use_ppo_kernels", "PYTHONPATH": path}
    output = subprocess.check_output(
        [sys.executable, "-c", code], env=os.environ | environment, text=True
    )
    assert output.split()[-2:] == 2 * ["ppo_kernels.integrations.verl"]
