"""The stages in several processes (gloo): the same run as in one."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from rlhf import cli
from rlhf.config.ppo import PPOConfig
from rlhf.errors import UserError
from rlhf.optim import clip_gradients
from tests.rlhf.helpers.processes import torchrun
from tests.rlhf.helpers.stages import records

WHOLE_RUN = {
    "rollout_batch_size": 32,
    "per_device_train_batch_size": 4,
    "num_mini_batches": 2,
    "total_episodes": 32 * 3,
    "response_length": 6,
    "sample_response_length": True,
    "score_scaling": "running",
    "whiten_rewards": True,
    "adaptive_kl": "token",
    "target_kl": 0.01,
    "entropy_coef": 0.01,
    "missing_eos_penalty": 0.5,
}


@pytest.fixture
def config_file(ppo_config, tmp_path):
    """A configuration as a YAML file for `rlhf ppo`."""

    def make(**changes) -> Path:
        config = ppo_config(output_dir=str(tmp_path / "run"), **changes)
        values = {name: value for name, value in vars(config).items() if value is not None}
        file = tmp_path / "ppo.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return make


def assert_close(actual: list[dict], expected: list[dict]) -> None:
    """To 5e-6, of the value where it is larger than 1: Adam's first steps make as much of the sums'
    other rounding."""
    assert len(actual) == len(expected)
    for line, truth in zip(actual, expected, strict=True):
        assert line.keys() == truth.keys()
        for name, value in truth.items():
            assert line[name] == pytest.approx(value, rel=5e-6, abs=5e-6), name


def test_world_size_invariance(config_file, ppo_config, tmp_path, world):
    """Metrics (to 1e-6) and weights of two processes are those of one."""
    from rlhf.ppo.train import train_ppo

    options = WHOLE_RUN | {"eval_dataset_name": str(world / "prompts.jsonl"), "save_steps": 2}
    file = config_file(**options)
    run = torchrun(2, "-m", "rlhf", "ppo", "--config", str(file))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("ppo 1/3") == 1  # Only the main process reports.
    train_ppo(ppo_config(output_dir=str(tmp_path / "alone"), **options))
    assert_close(records(tmp_path / "run"), records(tmp_path / "alone"))
    for model in ("", "critic"):
        two, one = (load_weights(tmp_path / name / model) for name in ("run", "alone"))
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=0, msg=name)

    # The two go on from their own checkpoint, bit for bit, and a single one refuses it.
    whole = records(tmp_path / "run")
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resume = ["--resume_from_checkpoint", checkpoint]
    run = torchrun(2, "-m", "rlhf", "ppo", "--config", str(file), *resume)
    assert run.returncode == 0, run.stderr
    assert records(tmp_path / "run") == whole
    options |= {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": checkpoint}
    with pytest.raises(UserError, match="was written by 2 processes, and here are 1"):
        train_ppo(ppo_config(**options))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_whitening_is_centred_across_ranks(config_file, tmp_path, world):
    """Over all responses the advantages have mean 0 and deviation 1; over one rank's they do not.
    A NaN that only the second rank's reward returns ends both, with the sample named. And the
    gradients that the ranks share out are those of the logits where they are made of hidden states,
    with a head tied to the embeddings or not."""
    script = Path(__file__).with_name("helpers") / "two_ranks.py"
    file = config_file(reward_funcs=[f"{script}:odd_one_out"], per_device_train_batch_size=4)
    for model in ("llama", "gpt2"):
        for name in (model, f"{model}-reward"):
            (tmp_path / name).symlink_to(world / name)
    run = torchrun(2, str(script), str(file), str(tmp_path))
    assert run.returncode == 0, run.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["all"] == second["all"]
    mean, deviation = first["all"]
    assert mean == pytest.approx(0, abs=1e-6) and deviation == pytest.approx(1, abs=1e-4)
    assert min(abs(first["mine"][0]), abs(second["mine"][0])) > 1e-3
    assert first["error"] == second["error"]
    assert "nan" in first["error"] and "prompt '" in first["error"]
    assert first["from hidden"] == second["from hidden"]
    assert first["from hidden"].keys() == {"llama", "gpt2"}
    assert max(first["from hidden"].values()) < 1e-5


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_world_size_invariance_of_supervised_stages(stage, world, tmp_path):
    """Where an epoch's last batch leaves one process without rows (SFT), or with fewer (reward)."""
    start, data, count = {
        "sft": ("llama", "texts.jsonl", 38),
        "reward": ("llama-reward", "pairs.jsonl", 44),
    }[stage]
    rows = (world / data).read_text().splitlines()[:count]
    (tmp_path / data).write_text("\n".join(rows))
    values = {
        "model_name_or_path": str(world / start),
        "dataset_name": str(tmp_path / data),
        "eval_dataset_name": str(world / data),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 32,
        "max_steps": 8,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 4,
        "report_to": "none",
    }
    folders, files = [], []
    for processes in (2, 1):
        folders.append(tmp_path / str(processes))
        files.append(tmp_path / f"{processes}.yaml")
        own = {"output_dir": str(folders[-1]), "gradient_accumulation_steps": 4 // processes}
        files[-1].write_text(yaml.safe_dump(values | own))
    run = torchrun(2, "-m", "rlhf", stage, "--config", str(files[0]))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"{stage} 1/8") == 1
    assert cli.main([stage, "--config", str(files[1])]) == 0
    two, one = map(records, folders)
    assert len(one) == 8 + 3
    assert_close(two, one)
    two, one = map(load_weights, folders)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=0, msg=name)


def test_a_wrong_option_is_reported_once(config_file):
    file = config_file(rollout_batch_size=40)
    run = torchrun(2, "-m", "rlhf", "ppo", "--config", str(file))
    assert run.returncode != 0
    assert run.stderr.count("rollout_batch_size 40 must be a multiple of") == 1


def run_with_own_data(stage: str, world: Path, folder: Path) -> subprocess.CompletedProcess:
    """Runs two processes, each of which reads the file data-RANK.jsonl of the folder."""
    options = {
        "model_name_or_path": str(world / "llama"),
        "dataset_name": str(folder / "data-$RANK.jsonl"),
        "output_dir": str(folder / "run"),
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    return torchrun(2, "-m", "rlhf", stage, *arguments)


def test_processes_with_other_data_are_refused(world, tmp_path):
    """They are told apart before the output folder is touched."""
    rows = (world / "texts.jsonl").read_text().splitlines()
    (tmp_path / "data-0.jsonl").write_text("\n".join(rows))
    (tmp_path / "data-1.jsonl").write_text("\n".join(reversed(rows)))
    run = run_with_own_data("sft", world, tmp_path)
    assert run.returncode != 0 and not (tmp_path / "run").exists()
    assert run.stderr.count("holds something else for process 1 than for process 0") == 1


def test_divergence_is_told_by_the_main_process():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), math.nan)
    with pytest.raises(UserError, match="training diverged") as error:
        clip_gradients([parameter], 1.0)
    assert error.value.on_all_ranks  # Its norm is the same on all.


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_what_one_process_alone_finds_wrong_is_reported_once(stage, world, tmp_path):
    data = {"sft": "texts", "reward": "pairs"}[stage]
    shutil.copyfile(world / f"{data}.jsonl", tmp_path / "data-0.jsonl")
    (tmp_path / "data-1.jsonl").write_text("{}\n")
    run = run_with_own_data(stage, world, tmp_path)
    assert run.returncode != 0
    assert run.stderr.count(f"rlhf {stage}: error: ") == 1
    assert "data-1.jsonl" in run.stderr and not (tmp_path / "run").exists()


def test_an_error_of_one_rank_is_told_by_it(monkeypatch, capsys):
    """The others cannot know of it, as in the middle of a pass."""
    monkeypatch.setenv("RANK", "1")
    for on_all_ranks, told in ((False, "rlhf sft: error: diverged\n"), (True, "")):
        error = UserError("diverged", on_all_ranks=on_all_ranks)
        monkeypatch.setattr(cli, "run_stage", raiser(error))
        assert cli.main(["sft"]) == 2
        assert capsys.readouterr().err == told


def raiser(error):
    def run(*args):
        raise error

    return run


def test_shares_of_a_batch(monkeypatch):
    from rlhf import distributed

    monkeypatch.setenv("WORLD_SIZE", "3")
    rows = list(range(12))
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(rows[distributed.my_rows(12)])
    assert shares == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_the_default_batch_grows_with_the_processes():
    config = PPOConfig(
        **dict.fromkeys(("model_name_or_path", "dataset_name", "output_dir"), "-"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        num_mini_batches=2,
    )
    assert [config.responses_per_iteration(n) for n in (1, 2)] == [24, 48]
    assert math.ceil(config.total_episodes / 24) == 417
