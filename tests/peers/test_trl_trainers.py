"""TRL's trainers give the same losses patched and unpatched; what both cost is printed (-s)."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from ppo_kernels import dispatch
from ppo_kernels.integrations import patch, trl
from tests.peers import trainers

OPS = ("token_logprobs", "token_logprobs_and_entropy", "linear_token_logprobs_and_entropy")
# Clocks, and what depends on them.
CLOCKS = ("eps", "step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def run_both(trainer, tmp_path, monkeypatch, vocabulary, **options):
    calls = []
    for name in OPS:
        real = getattr(trl, name)
        monkeypatch.setattr(trl, name, lambda *x, f=real, **k: calls.append(1) or f(*x, **k))
    unpatched = trainer(tmp_path / "unpatched", vocabulary, **options)
    assert not calls
    with patch("trl"):
        patched = trainer(tmp_path / "patched", vocabulary, **options)
    assert calls
    for name, run in (("unpatched", unpatched), ("patched", patched)):
        print(f"\n{trainer.__name__} at V = {vocabulary}, {name}: {run}")
    return unpatched, patched


@pytest.mark.parametrize("trainer", [trainers.ppo, trainers.grpo])
def test_same_losses(trainer, tmp_path, monkeypatch):
    if trainer is trainers.ppo:
        pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO trainer any more")
    unpatched, patched = run_both(trainer, tmp_path, monkeypatch, 1000)
    assert len(unpatched.logs) == len(patched.logs) >= 2
    losses = 0
    for ours, theirs in zip(patched.logs, unpatched.logs, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - set(CLOCKS):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
            losses += "loss" in key and abs(ours[key]) > 1e-3
    assert losses >= 2
    # Adam's first steps turn a gradient's sign into a step of the whole learning rate, 1e-3.
    for ours, theirs in zip(patched.weights, unpatched.weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_ppo_update_is_faster_at_32000(tmp_path, monkeypatch):
    """CPU seconds of the updates, one thread: a busy neighbour does not count."""
    pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO trainer any more")
    # From a checkout that is not installed with -e Python takes the sources, without the extension.
    if (reason := dispatch.why_not("native", "cpu")) is not None:
        pytest.skip(f"on plain PyTorch: {reason}")
    options = {"batch": 32, "response_length": 32, "steps": 1, "epochs": 4}
    pairs = [run_both(trainers.ppo, tmp_path, monkeypatch, 32_000, **options) for _ in range(2)]
    best = [min(run.update_cpu_s for run in runs) for runs in zip(*pairs, strict=True)]
    print(f"\nPPO's update at V = 32,000: {best[0] / best[1]:.2f} times faster patched")
    assert best[1] < best[0]
