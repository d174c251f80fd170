"""Runs that a signal ends: with a checkpoint, from which they go on as if it had never come."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf import cli
from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.ppo.train import train_ppo
from rlhf.ppo.trainer import PPOTrainer
from rlhf.reward_model import train_reward
from rlhf.run import signals
from rlhf.run.checkpoints import checkpoint_damage
from rlhf.run.saving import Checkpoints
from rlhf.run.state import load_state
from rlhf.sft import train_sft
from rlhf.supervised import SupervisedTrainer
from tests.rlhf.helpers.processes import torchrun
from tests.rlhf.helpers.stages import records

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}
REWARD = """
import random

def noise(completions):
    return [random.random() for _ in completions]
"""


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory) -> dict:
    """Of each stage what trains it and a configuration of four steps."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "reward.py").write_text(REWARD)
    common = {
        "output_dir": "",
        "learning_rate": 1e-3,
        "logging_steps": 3,
        "save_steps": 0,
        "report_to": "none",
    }
    supervised = common | {
        "model_name_or_path": str(world / "gpt2"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "max_steps": 4,
    }
    return {
        "sft": (train_sft, SFTConfig(dataset_name=str(world / "texts.jsonl"), **supervised)),
        "reward": (
            train_reward,
            RewardConfig(dataset_name=str(world / "pairs.jsonl"), **supervised),
        ),
        "ppo": (
            train_ppo,
            PPOConfig(
                model_name_or_path=str(world / "llama"),
                dataset_name=str(world / "prompts.jsonl"),
                reward_funcs=[str(world / "llama-reward"), f"{folder / 'reward.py'}:noise"],
                per_device_train_batch_size=8,
                num_mini_batches=2,
                num_ppo_epochs=1,
                total_episodes=16 * 4,
                response_length=6,
                sample_response_length=True,
                score_scaling="running",
                **common,
            ),
        ),
    }


def run(stage, output_dir, **changes):
    train, config = stage
    return train(type(config)(**vars(config) | {"output_dir": str(output_dir)} | changes))


def send_at(monkeypatch, owner, method: str, call: int, number: int, after: bool = False) -> None:
    """Has the process get a signal in the given call of a method, before or after what it does."""
    original, calls = getattr(owner, method), []

    def sending(*args, **kwargs):
        calls.append(method)
        here = len(calls) == call
        if here and not after:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if here and after:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, method, sending)


def results(folder) -> tuple:
    models = [folder / "model.safetensors", *sorted(folder.glob("critic/model.safetensors"))]
    return [load_file(file) for file in models], records(folder)


def assert_goes_on_bitwise(stage, output_dir, reference) -> None:
    run(stage, output_dir, resume_from_checkpoint="auto")
    (weights, metrics), (expected, lines) = results(output_dir), results(reference)
    for got, wanted in zip(weights, expected, strict=True):
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in got)
    assert metrics == lines


@pytest.fixture(scope="module")
def unbroken(stages, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("unbroken")
    for name, stage in stages.items():
        run(stage, folder / name)
    return {name: folder / name for name in stages}


# In the middle of a gradient, and of an iteration whose weights have not moved, the step is
# dropped; in the middle of an update it is finished.
@pytest.mark.parametrize(
    ("name", "owner", "method", "call", "number", "step"),
    [
        ("sft", SupervisedTrainer, "backward", 8, signal.SIGTERM, 2),
        ("sft", SupervisedTrainer, "take_step", 2, signal.SIGINT, 2),
        ("reward", SupervisedTrainer, "backward", 4, signal.SIGUSR1, 1),
        ("ppo", PPOTrainer, "sample", 3, signal.SIGTERM, 2),
        ("ppo", PPOTrainer, "evaluate", 2, signal.SIGINT, 1),
        ("ppo", PPOTrainer, "_step", 2, signal.SIGUSR1, 1),
        ("ppo", PPOTrainer, "_step", 8, signal.SIGTERM, 4),
    ],
)
def test_a_signal_leaves_a_checkpoint_to_go_on_from_bitwise(
    stages, unbroken, tmp_path, monkeypatch, capsys, name, owner, method, call, number, step
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        send_at(patch, owner, method, call, number)
        with pytest.raises(signals.Stopped) as stopped:
            run(stages[name], out)
    assert stopped.value.code == CODES[number]
    (error,) = re.findall("^rlhf .*", capsys.readouterr().err, re.MULTILINE)
    assert error.startswith(f"rlhf {name}: {signals.WORDS[number]}: checkpoint-{step} is saved ")
    assert f"--config {out / name}.yaml --resume_from_checkpoint auto" in error
    assert checkpoint_damage(out / f"checkpoint-{step}") is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert_goes_on_bitwise(stages[name], out, unbroken[name])


def test_a_step_that_is_saved_is_not_saved_again(stages, tmp_path, monkeypatch):
    send_at(monkeypatch, Checkpoints, "save", 1, signal.SIGTERM, after=True)
    with pytest.raises(signals.Stopped):
        run(stages["sft"], tmp_path / "out", save_steps=2)
    file = tmp_path / "out" / "checkpoint-2" / "manifest.json"
    before = file.stat().st_mtime_ns
    send_at(monkeypatch, SupervisedTrainer, "backward", 2, signal.SIGTERM)
    with pytest.raises(signals.Stopped):
        run(stages["sft"], tmp_path / "out", save_steps=2, resume_from_checkpoint="auto")
    assert file.stat().st_mtime_ns == before


def test_before_the_first_step_there_is_nothing_to_save(stages, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, PPOTrainer, "sample", 1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(stages["ppo"], tmp_path / "out")
    assert "rlhf ppo: interrupted: before the first step in" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_signal_at_the_end_lets_the_run_finish(stages, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, Checkpoints, "save_models", 1, signal.SIGTERM)
    with pytest.raises(signals.Stopped) as stopped:
        run(stages["reward"], tmp_path / "out")
    assert stopped.value.code == 143
    assert "out holds the whole run" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").exists()


def test_the_best_checkpoint_is_not_judged_by_a_step_that_measured_nothing(
    stages, tmp_path, monkeypatch
):
    best = {"metric_for_best_model": "objective/scores", "save_steps": 2, "logging_steps": 2}
    send_at(monkeypatch, PPOTrainer, "_step", 5, signal.SIGTERM)
    with pytest.raises(signals.Stopped):
        run(stages["ppo"], tmp_path / "out", **best)
    names = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-3"}


def test_the_command_ends_with_the_signal_s_code(stages, tmp_path, monkeypatch, capsys):
    _, config = stages["sft"]
    send_at(monkeypatch, SupervisedTrainer, "backward", 3, signal.SIGTERM)
    argv = ["--max_steps=4", "--save_steps=0", "--report_to=none", f"--output_dir={tmp_path / 'o'}"]
    argv += [f"--{name}={getattr(config, name)}" for name in ("model_name_or_path", "dataset_name")]
    assert cli.main(["sft", *argv]) == 143
    assert capsys.readouterr().err.count("\n") == 1


def test_processes_end_together_at_the_signal_of_one(stages, tmp_path):
    """It comes to the second, in the second iteration, while the first knows nothing of it."""
    _, config = stages["ppo"]
    (tmp_path / "reward.py").write_text(
        "import os, signal\n"
        "calls = []\n"
        "def length(completions):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [len(text) for text in completions]\n"
    )
    rewards = [f"{tmp_path / 'reward.py'}:length"]
    values = vars(config) | {"reward_funcs": rewards, "output_dir": str(tmp_path / "out")}
    file = tmp_path / "ppo.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    done = torchrun(2, "-m", "rlhf", "ppo", "--config", str(file))
    assert done.returncode != 0 and "rlhf/ppo/" not in done.stderr  # but torchrun's own report
    assert done.stderr.startswith("rlhf ppo: ended by SIGTERM: checkpoint-1 is saved in ")
    assert done.stderr.count("rlhf ppo: ") == 1
    assert checkpoint_damage(tmp_path / "out" / "checkpoint-1") is None
    assert load_state(tmp_path / "out" / "checkpoint-1" / "state.pt")["iteration"] == 1


# Processes of their own


def python(program: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, signal, sys, time; from rlhf.run import signals\n{program}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


SEND_TWICE = """
signals.interrupt_at_once(["ppo"])
signals.catch()
os.kill(os.getpid(), signal.SIGTERM)
print("first", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("second", flush=True)
time.sleep(3)
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_second_signal_ends_at_once():
    out, error = (process := python(SEND_TWICE)).communicate()
    assert (process.returncode, out) == (130, "first\n")
    assert error == "rlhf ppo: interrupted\n"


def test_what_torchrun_hands_on_is_no_second_signal():
    out, error = (process := python(SEND_TWICE, WORLD_SIZE="2")).communicate()
    assert (process.returncode, out) == (143, "first\nsecond\n")
    assert error == "rlhf ppo: ended by SIGTERM\n"


def test_a_helper_that_is_forked_ends_by_its_signals():
    """As `multiprocessing.Pool.terminate` wants it, which else would wait for ever."""
    program = """
signals.catch()
helper = os.fork()
if helper == 0:
    print("ready", flush=True)
    time.sleep(60)
time.sleep(0.3)
os.kill(helper, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]), signals.received())
"""
    start = time.monotonic()
    out, _ = python(program).communicate()
    assert out == "ready\n-15 0\n" and time.monotonic() - start < 30
