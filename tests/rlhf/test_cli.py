"""The command line: exit codes, and one clear line for everything a user can get wrong."""

import errno
import os
import shutil
import subprocess
import threading

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import COMMANDS, STAGES, load, main
from rlhf.demo.base import write_jsonl
from rlhf.run.checkpoints import checkpoint_damage
from tests.rlhf.helpers.command import fails


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_a_function_that_is_there(command):
    assert callable(load(command))


# Processes and interruptions


def test_the_demo_runs_in_one_process(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(capsys, ["demo"], "runs in one process", "torchrun")


def test_an_interrupt_exits_with_130(options, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.sft.train_sft", interrupt)
    assert main(options("sft")) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_full_disk_is_one_line_wherever_it_happens(options, capsys, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr("rlhf.sft.train_sft", write)
    fails(capsys, options("sft"), "No space left on device", "metrics.jsonl", "free some space")


def test_any_error_of_the_file_system_is_one_line(options, capsys, monkeypatch):
    def fail(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "completions.md")

    monkeypatch.setattr("rlhf.sft.train_sft", fail)
    fails(capsys, options("sft"), "Permission denied: 'completions.md': mend that and run it again")


def test_a_full_disk_prints_nothing_of_tensorboard_s_thread(options, capsys, monkeypatch):
    """Whose error is told once, by the main thread."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    argv = options("sft", report_to="tensorboard", max_steps=3, logging_steps=1)
    fails(capsys, argv, "cannot write metrics to", "No space left on device", "free some space")


def test_an_error_of_ours_keeps_its_traceback(options, monkeypatch):
    def fail(*_):
        raise KeyError("ours")

    monkeypatch.setattr("rlhf.sft.train_sft", fail)
    with pytest.raises(KeyError, match="ours"):
        main(options("sft"))


# Data


@pytest.mark.parametrize(
    ("stage", "content", "expected"),
    [
        ("sft", "", ["empty"]),
        ("reward", "", ["empty"]),
        ("ppo", "", ["empty"]),
        ("sft", '{"text": "film"}\n{"text": \n', ["line 2", "not valid JSON"]),
        ("sft", "[1]\n", ["row 1", "must be an object"]),
        ("sft", '{"txt": "film"}\n', ["text", "['txt']"]),
        ("sft", '{"text": "film"}\n{"text": null}\n', ["row 2", "text must be", "None"]),
        ("sft", '{"text": "film"}\n{"text": 3}\n', ["row 2", "text must be", "3"]),
        ("sft", '{"text": "film"}\n{"txt": "film"}\n', ["row 2", "text must be"]),
        ("sft", "[" * 100_000, ["line 1", "nested too deeply"]),
        ("reward", '{"prompt": "film", "chosen": "good"}\n', ["rejected", "['prompt', 'chosen']"]),
        ("reward", '{"prompt": "film", "ranking": ["good"]}\n', ["row 1", "at least 2"]),
        ("ppo", '{"txt": "film"}\n', ["prompt", "['txt']"]),
    ],
)
def test_wrong_data(options, capsys, tmp_path, stage, content, expected):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    fails(capsys, options(stage, dataset_name=path), str(path), *expected)
    assert not (tmp_path / "out").exists()


USER, ASSISTANT = ({"role": role, "content": "film"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("stage", "row"),
    [
        ("sft", {"messages": [USER, ASSISTANT]}),
        ("reward", {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}),
        ("ppo", {"prompt": [USER]}),
    ],
)
def test_messages_need_a_chat_template(options, capsys, tmp_path, stage, row):
    write_jsonl(tmp_path / "chat.jsonl", [row])
    fails(capsys, options(stage, dataset_name=tmp_path / "chat.jsonl"), "chat template")
    assert not (tmp_path / "out").exists()


def test_missing_files(options, capsys, tmp_path):
    fails(capsys, options("sft", dataset_name="nowhere.jsonl"), "nowhere.jsonl", "does not exist")
    fails(
        capsys, options("sft", model_name_or_path=tmp_path), str(tmp_path), "cannot open the folder"
    )
    assert not (tmp_path / "out").exists()


def test_sequences_must_fit_the_model(options, capsys, tmp_path):
    path = tmp_path / "long.jsonl"
    write_jsonl(path, [{"text": "film " * 100}])
    fails(capsys, options("sft", dataset_name=path), "101 tokens", "64 positions", "max_length")
    pairs = tmp_path / "long_pairs.jsonl"
    write_jsonl(pairs, [{"prompt": "", "chosen": "film " * 100, "rejected": "film"}])
    fails(capsys, options("reward", eval_dataset_name=pairs), "102 tokens", "lower max_length")
    fails(capsys, options("ppo", response_length=62), "65 tokens", "lower max_prompt_length")
    assert not (tmp_path / "out").exists()


# Models and folders


def test_a_damaged_model_folder(options, capsys, world, tmp_path):
    shutil.copytree(world / "llama", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(capsys, options("sft", model_name_or_path=tmp_path / "cut"), "cannot open the folder")


@pytest.mark.parametrize("stage", STAGES)
def test_vocabularies_of_tokenizer_and_model_must_agree(options, capsys, world, tmp_path, stage):
    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    tokenizer.add_tokens(["new"])
    AutoModelForCausalLM.from_pretrained(world / "llama").save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    argv = options(stage, model_name_or_path=tmp_path / "other")
    fails(capsys, argv, "tokenizer has 14 tokens", "model 13")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_tokenizer_without_pad_and_eos(options, capsys, world, tmp_path, stage):
    shutil.copytree(world / "llama", tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(world / "llama", pad_token=None, eos_token=None)
    tokenizer.save_pretrained(tmp_path / "bare")
    fails(capsys, options(stage, model_name_or_path=tmp_path / "bare"), "must have an EOS token")


def test_a_tokenizer_without_pad_uses_eos(options, world, tmp_path):
    shutil.copytree(world / "llama", tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(world / "llama", pad_token=None)
    tokenizer.save_pretrained(tmp_path / "bare")
    assert main(options("ppo", model_name_or_path=tmp_path / "bare")) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<eos>"


def test_an_output_folder_in_use_is_kept(options, capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    fails(capsys, options("sft"), str(out), "not empty: choose another folder")
    fails(capsys, [*options("sft"), "--overwrite_output_dir"], "holds no .rlhf-run.json")
    assert (out / "thesis.txt").read_text() == "years of work"
    fails(capsys, options("sft", output_dir=out / "thesis.txt"), "is a file")


# Rewards

REWARDS = """
import numpy as np

def raises(completions, **_):
    return [1 / 0 for completion in completions]

def too_few(completions, **_):
    return [0.0] * (len(completions) - 1)

def nan(completions, **_):
    return [0.0] * (len(completions) - 1) + [float("nan")]

def inf(completions, **_):
    return np.full(len(completions), -np.inf)

def words(completions, **_):
    return ["good"] * len(completions)

def silent(completions, **_):
    return [None] * len(completions)

def needs(label):
    return [0.0] * len(label)
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raises", ["raises raised ZeroDivisionError", "division by zero", "line 5"]),
        ("too_few", ["too_few returned 7 scores for 8 completions"]),
        ("nan", ["nan gave nan", "film"]),
        ("inf", ["inf gave -inf", "film"]),
        ("words", ["'good'"]),
        ("silent", ["None"]),
        ("needs", ["'label'", "column"]),
        ("raise", ["'raise'", "raises"]),
    ],
)
def test_wrong_reward_functions(options, capsys, tmp_path, name, expected):
    (tmp_path / "scores.py").write_text(REWARDS)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "film"}, {"prompt": "film is"}] * 4)
    argv = options(
        "ppo",
        reward_funcs=f"{tmp_path / 'scores.py'}:{name}",
        dataset_name=tmp_path / "prompts.jsonl",
    )
    fails(capsys, argv, *expected)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere.py:score", ["nowhere.py", "does not exist"]),
        ("no_such_module:score", ["no_such_module"]),
        ("nowhere/at/all", ["nowhere/at/all"]),
    ],
)
def test_rewards_that_are_not_there(options, capsys, tmp_path, source, expected):
    fails(capsys, options("ppo", reward_funcs=source), *expected)
    assert not (tmp_path / "out").exists()


def test_a_run_needs_a_reward(options, capsys, tmp_path):
    required = [option for option in options("ppo") if not option.startswith("--reward_funcs")]
    fails(capsys, required, "reward_funcs must name")
    (tmp_path / "none.yaml").write_text("reward_funcs: []")
    fails(capsys, [*required, f"--config={tmp_path}/none.yaml"], "reward_funcs must name")
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_no_reward_model(options, capsys, world):
    argv = options("ppo", reward_funcs=world / "llama")
    fails(capsys, argv, str(world / "llama"), "is not a reward model", "rlhf reward")


# Checkpoints


def test_a_checkpoint_of_another_configuration(options, capsys, tmp_path):
    argv = options("ppo", save_steps=1, resume_from_checkpoint="auto")
    assert main(argv) == 0
    fails(capsys, [*argv, "--kl_coef=0.2"], "another configuration", "kl_coef is 0.05 there", "0.2")
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    argv = options("ppo", save_steps=1, resume_from_checkpoint=checkpoint, seed=3)
    fails(capsys, argv, "another configuration", "seed is 0 there and 3 here")


def test_a_checkpoint_that_is_not_there(options, capsys, tmp_path):
    fails(capsys, options("ppo", resume_from_checkpoint=tmp_path / "nowhere"), "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(options, capsys, small_disk, tmp_path):
    (tmp_path / "fill.py").write_text(
        f"""
from pathlib import Path

full = Path({str(small_disk)!r}, "full")

def fill(completions, **_):
    if Path({str(small_disk)!r}, "out", "checkpoint-1").exists() and not full.exists():
        try:
            with full.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass
    return [0.0] * len(completions)
"""
    )
    argv = options(
        "ppo",
        output_dir=small_disk / "out",
        reward_funcs=f"{tmp_path / 'fill.py'}:fill",
        save_steps=1,
        resume_from_checkpoint="auto",
    )
    fails(capsys, argv, "No space left on device", "free some space")
    assert checkpoint_damage(small_disk / "out" / "checkpoint-1") is None
    assert not (small_disk / "out" / "checkpoint-2").exists()
    (small_disk / "full").write_bytes(b"")
    assert main(argv) == 0
    assert checkpoint_damage(small_disk / "out" / "checkpoint-2") is None
