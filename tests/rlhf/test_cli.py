"""The command line: exit codes, and one clear line for everything a user can get wrong."""

import dataclasses
import json
import shutil

import pytest
import yaml

from rlhf.cli import main, parse_config
from rlhf.config import PPOConfig, RewardConfig, SFTConfig
from rlhf.errors import UserError
from rlhf.tasks.base import write_jsonl


@pytest.fixture
def options(world, tmp_path):
    """Options of a command that would run."""

    def make(stage: str, **changes) -> list[str]:
        data = {"sft": "texts", "reward": "pairs", "ppo": "prompts"}[stage]
        values = {
            "model_name_or_path": world / "llama",
            "dataset_name": world / f"{data}.jsonl",
            "output_dir": tmp_path / "out",
            "report_to": "none",
        }
        if stage == "ppo":
            values["reward_model_path"] = world / "llama-reward"
        values |= changes
        return [stage, *(f"--{key}={value}" for key, value in values.items())]

    return make


def fails(capsys, argv: list[str], *expected: str) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"rlhf {argv[0]}: error: ")
    for part in expected:
        assert part in error


def test_a_yaml_file_with_overrides_runs_a_stage(world, tmp_path, capsys):
    file = tmp_path / "sft.yaml"
    values = {
        "model_name_or_path": str(world / "llama"),
        "dataset_name": str(world / "texts.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "learning_rate": "1e-2",
        "max_steps": 7,
        "report_to": "none",
        "eval_dataset_name": None,
    }
    file.write_text(yaml.safe_dump(values))
    assert main(["sft", str(file), "--max_steps", "3", "--learning-rate=2e-3"]) == 0
    assert "done" in capsys.readouterr().out
    saved = yaml.safe_load((tmp_path / "out" / "sft.yaml").read_text())
    assert (saved["max_steps"], saved["learning_rate"]) == (3, 2e-3)
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    again = ["sft", str(tmp_path / "out" / "sft.yaml")]
    assert main(again) == 2
    assert main([*again, "--overwrite_output_dir"]) == 0


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, PPOConfig])
def test_every_option_is_documented(config):
    assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(config))


@pytest.mark.parametrize("command", ["sft", "reward", "ppo"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--learning_rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "did you mean --learning_rate?"]),
        (["--learning_rate", "fast"], ["learning_rate", "'fast'"]),
        (["--learning_rate", "-1"], ["learning_rate must be >= 0", "-1.0"]),
        (["--learning_rate", "nan"], ["learning_rate must be >= 0", "nan"]),
        (["--max_grad_norm", "0"], ["max_grad_norm must be > 0", "0.0"]),
        (["--lr_scheduler_type", "square"], ["lr_scheduler_type", "cosine", "'square'"]),
        (["--seed", str(2**70)], ["seed must be in [0, 2**63)"]),
        (["--per_device_train_batch_size", "0"], ["per_device_train_batch_size must be >= 1"]),
    ],
)
def test_wrong_options(options, capsys, extra, expected):
    fails(capsys, options("sft") + extra, *expected)


def test_switches(options):
    argv = options("ppo")[1:]
    assert parse_config("ppo", argv).whiten_advantages
    assert not parse_config("ppo", [*argv, "--no_whiten_advantages"]).whiten_advantages
    assert not parse_config("ppo", [*argv, "--whiten_advantages", "false"]).whiten_advantages
    assert parse_config("ppo", [*argv, "--bf16"]).bf16


def test_missing_options_are_named(capsys):
    fails(capsys, ["sft"], "--model_name_or_path", "--dataset_name", "--output_dir")


def test_ppo_ranges(options, capsys):
    fails(capsys, options("ppo", temperature=0), "temperature must be > 0", "0.0")
    fails(capsys, options("ppo", gamma=1.5), "gamma must be in [0, 1]", "1.5")
    fails(
        capsys,
        options("ppo", response_length=4, min_response_length=5),
        "min_response_length must be in [0, response_length = 4], got 5",
    )


@pytest.mark.parametrize(
    ("stage", "content", "expected"),
    [
        ("sft", "", ["empty"]),
        ("sft", '{"text": "film"}\n{"text": \n', ["line 2", "not valid JSON"]),
        ("sft", "[1]\n", ["row 1", "must be an object"]),
        ("sft", '{"txt": "film"}\n', ["must have the columns text", "['txt']"]),
        ("sft", '{"text": "film"}\n{"text": null}\n', ["row 2", "text must be a str", "None"]),
        ("sft", '{"text": "film"}\n{"text": 3}\n', ["row 2", "text must be a str", "3"]),
        ("sft", '{"text": "film"}\n{"txt": "film"}\n', ["row 2", "text must be a str"]),
        ("sft", '{"text": 3}\n', ["row 1", "text must be a str", "3"]),
        ("sft", "[" * 100_000, ["line 1", "nested too deeply"]),
        ("reward", '{"prompt": "film", "chosen": "good"}\n', ["rejected", "['prompt', 'chosen']"]),
        ("reward", '{"prompt": "film", "ranking": ["good"]}\n', ["row 1", "at least 2"]),
        ("ppo", '{"text": "film"}\n', ["must have the columns prompt", "['text']"]),
    ],
)
def test_wrong_data(options, capsys, tmp_path, stage, content, expected):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    fails(capsys, options(stage, dataset_name=path), str(path), *expected)
    assert not (tmp_path / "out").exists()


def test_missing_files(options, capsys, tmp_path):
    fails(capsys, options("sft", dataset_name="nowhere.jsonl"), "nowhere.jsonl", "does not exist")
    fails(
        capsys, options("sft", model_name_or_path=tmp_path), str(tmp_path), "cannot open the folder"
    )
    fails(capsys, ["sft", "nowhere.yaml"], "cannot read nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("output_dir: café".encode("latin-1"))
    fails(capsys, ["sft", str(tmp_path / "latin.yaml")], "cannot read", "utf-8")
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_folder(options, capsys, world, tmp_path):
    shutil.copytree(world / "llama", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(capsys, options("sft", model_name_or_path=tmp_path / "cut"), "cannot open the folder")


def test_an_output_folder_in_use_is_kept(options, capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    fails(capsys, options("sft"), str(out), "not empty", "--overwrite_output_dir")
    fails(capsys, [*options("sft"), "--overwrite_output_dir"], "holds no sft.yaml")
    assert (out / "thesis.txt").read_text() == "years of work"
    fails(capsys, options("sft", output_dir=out / "thesis.txt"), "is a file")


def test_policy_and_reward_model_must_share_their_tokenizer(options, capsys, world, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    tokenizer.add_tokens(["new"])
    AutoModelForCausalLM.from_pretrained(world / "llama").save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    fails(capsys, options("ppo", reward_model_path=tmp_path / "other"), "the same tokenizer")


def test_a_language_model_is_no_reward_model(options, capsys, world):
    argv = options("ppo", reward_model_path=world / "llama")
    fails(capsys, argv, str(world / "llama"), "is not a reward model", "rlhf reward")


def test_sequences_must_fit_the_model(options, capsys, tmp_path):
    path = tmp_path / "long.jsonl"
    write_jsonl(path, [{"text": "film " * 100}])
    fails(capsys, options("sft", dataset_name=path), "101 tokens", "64 positions", "max_length")
    pairs = tmp_path / "long_pairs.jsonl"
    write_jsonl(pairs, [{"prompt": "", "chosen": "film " * 100, "rejected": "film"}])
    fails(capsys, options("reward", eval_dataset_name=pairs), "102 tokens", "lower max_length")
    fails(capsys, options("ppo", response_length=62), "65 tokens", "lower max_prompt_length")
    assert not (tmp_path / "out").exists()


def test_a_yaml_file_must_be_flat(capsys, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("- a\n- b\n")
    fails(capsys, ["ppo", str(file)], "must hold lines 'key: value'")
    file.write_text("a: [")
    fails(capsys, ["ppo", str(file)], "not valid YAML")


def test_configurations_check_values_in_code_too(world):
    with pytest.raises(UserError, match=r"kl_coef must be >= 0 and finite, got -0\.1"):
        PPOConfig(
            model_name_or_path="a",
            reward_model_path="b",
            dataset_name="c",
            output_dir="d",
            kl_coef=-0.1,
        )


def test_an_interrupt_exits_with_130(options, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.sft.train_sft", interrupt)
    assert main(options("sft")) == 130
    assert "interrupted" in capsys.readouterr().err
