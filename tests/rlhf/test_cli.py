"""The command line: exit codes, and one clear line for everything a user can get wrong."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import threading

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import COMMANDS, CONFIGURED, STAGES, main, parse_config, sections
from rlhf.config.fields import SECTIONS
from rlhf.config.ppo import PPOConfig
from rlhf.demo.base import write_jsonl
from rlhf.errors import UserError
from rlhf.run.checkpoints import checkpoint_damage

REQUIRED = {
    "sft": ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o"],
    "reward": ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o"],
    "ppo": ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o", "--reward_funcs=r"],
    "generate": ["--model_name_or_path=m", "--output_file=o", "--prompt=p"],
    "evaluate": [
        "--policies",
        "a",
        "b",
        "--dataset_name=d",
        "--output_file=o.json",
        "--reward_funcs=r",
    ],
}


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
            values |= {
                "reward_funcs": world / "llama-reward",
                "total_episodes": 16,
                "response_length": 4,
            }
        values |= changes
        return [stage, *(f"--{key}={value}" for key, value in values.items())]

    return make


@pytest.fixture
def parse_yaml(tmp_path):
    """A PPOConfig from the text of a file, after the required options."""

    def parse(text: str, *options: str) -> PPOConfig:
        (tmp_path / "ppo.yaml").write_text(text, encoding="utf-8")
        return parse_config("ppo", [*REQUIRED["ppo"], f"--config={tmp_path}/ppo.yaml", *options])

    return parse


def fails(capsys, argv: list[str], *expected: str) -> None:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"rlhf {argv[0]}: error: ")
    for part in expected:
        assert part in error


# Files and options


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
    assert main(["sft", "--max_steps", "3", "--config", str(file), "--learning-rate=2e-3"]) == 0
    assert f"{tmp_path / 'out'}: done" in capsys.readouterr().out
    saved = yaml.safe_load((tmp_path / "out" / "sft.yaml").read_text())
    assert (saved["max_steps"], saved["learning_rate"]) == (3, 2e-3)
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    again = ["sft", f"--config={tmp_path / 'out' / 'sft.yaml'}"]
    assert main(again) == 2
    assert main([*again, "--overwrite_output_dir"]) == 0


def test_ppo_mixes_a_reward_model_and_a_function_from_a_file(world, tmp_path):
    (tmp_path / "brevity.py").write_text(
        "def brevity(completion_ids, source, **_):\n"
        "    assert set(source) <= {'a', 'b'}\n"
        "    return [-len(ids) for ids in completion_ids]\n"
    )
    write_jsonl(
        tmp_path / "prompts.jsonl",
        [{"prompt": "film", "source": "a"}, {"prompt": "plot is", "source": "b"}],
    )
    (tmp_path / "run.yaml").write_text(
        f"""
        model_name_or_path: {world / "llama"}
        dataset_name: {tmp_path / "prompts.jsonl"}
        output_dir: {tmp_path / "out"}
        reward_funcs: [{world / "llama-reward"}, "{tmp_path / "brevity.py"}:brevity"]
        reward_weights: [1, 0.5]
        total_episodes: 16
        response_length: 4
        kl_coef: 0.2
        report_to: none
        """
    )
    assert main(["ppo", "--config", str(tmp_path / "run.yaml"), "--kl_coef", "0.1"]) == 0
    saved = yaml.safe_load((tmp_path / "out" / "ppo.yaml").read_text())
    assert (saved["kl_coef"], saved["reward_weights"]) == (0.1, [1.0, 0.5])
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_list_option_given_twice_collects_what_it_was_given(tmp_path):
    argv = [*REQUIRED["ppo"], "--reward_funcs=s", "--stop_token", "a", "b", "--stop_token=c"]
    config = parse_config("ppo", [*argv, "--seed=1", "--seed=2"])
    assert config.reward_funcs == ["r", "s"]
    assert config.stop_token == ["a", "b", "c"]
    assert config.seed == 2
    (tmp_path / "a.yaml").write_text("stop_token: [x, y]")
    argv = [*REQUIRED["ppo"], f"--config={tmp_path}/a.yaml"]
    assert parse_config("ppo", argv).stop_token == ["x", "y"]
    argv += ["--stop_token=a", "--stop_token=b"]
    assert parse_config("ppo", argv).stop_token == ["a", "b"]


def test_headings_stand_in_their_order():
    titles = list(sections(PPOConfig))
    assert titles == [*SECTIONS] and titles[0] == "Models and data" and titles[-1] == "Responses"
    assert "Learning" not in sections(COMMANDS["generate"].config)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("missing_eos_score: -1", "missing_eos_score", -1.0),
        ("missing_eos_score: -1e-3", "missing_eos_score", -1e-3),
        ("reward_funcs: [a, b]\nreward_weights: [1, -1e-3]", "reward_weights", [1.0, -1e-3]),
        ("reward_weights: 2", "reward_weights", [2.0]),
        ("stop_strings: ['-1', -x, --, --seed]", "stop_strings", ["-1", "-x", "--", "--seed"]),
        ("stop_strings: [no, 1.0, 2024-01-01]", "stop_strings", ["no", "1.0", "2024-01-01"]),
        ("stop_strings: ['null', ' ', \"\\n\"]", "stop_strings", ["null", " ", "\n"]),
        ("stop_token: </s>", "stop_token", ["</s>"]),
        ("stop_token:\n- é\n- b c", "stop_token", ["é", "b c"]),
        ("text_prompt_length: [3, 4]", "text_prompt_length", [3, 4]),
        ("whiten_advantages: no", "whiten_advantages", False),
        ("bf16: true", "bf16", True),
        ("eval_dataset_name: null\nkl_coef: ~", "eval_dataset_name", None),
        ("kl_coef:", "kl_coef", 0.05),
        ("report_to: none", "report_to", "none"),
        ("critic_model_path: 007", "critic_model_path", "007"),
        ("critic_model_path: 'null'", "critic_model_path", "null"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "auto"),
    ],
)
def test_values_of_a_yaml_file(tmp_path, text, name, expected):
    required = REQUIRED["ppo"][: -1 if text.startswith("reward_funcs") else None]
    (tmp_path / "ppo.yaml").write_text(text, encoding="utf-8")
    config = parse_config("ppo", [*required, f"--config={tmp_path}/ppo.yaml"])
    assert getattr(config, name) == expected
    assert type(getattr(config, name)) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1", ["unknown key 'learning_rat'", "did you mean 'learning_rate'?"]),
        ("qqqq: 1", ["unknown key 'qqqq'", "see rlhf ppo --help"]),
        ("learning-rate: 1", ["unknown key 'learning-rate'", "did you mean 'learning_rate'?"]),
        ("config: other.yaml", ["unknown key 'config'"]),
        ("1: 1", ["unknown key '1'"]),
        ("learning_rate: fast", ["learning_rate", "'fast'"]),
        ("learning_rate: -1", ["learning_rate must be >= 0", "-1.0"]),
        ("learning_rate: {max: 1}", ["learning_rate: must be a plain value", "{'max': '1'}"]),
        ("learning_rate: [1]", ["learning_rate: must be a plain value", "['1']"]),
        ("stop_token: [[a]]", ["stop_token: must be a list of plain values", "[['a']]"]),
        ("stop_token: [null]", ["stop_token: must be a list of plain values", "[None]"]),
        ("seed: 1.5", ["seed", "'1.5'"]),
        ("seed: true", ["seed", "'true'"]),
        ("bf16: maybe", ["bf16", "maybe"]),
        ("seed: 1\nseed: 2", ["not valid YAML", "'seed' is given twice", "line 2"]),
        ("[1]: 2", ["not valid YAML"]),
        ("seed: &a [*a]", ["not valid YAML"]),
        ("a: [", ["not valid YAML"]),
        ("[" * 100_000, ["not valid YAML"]),
        ("- a\n- b", ["must hold lines 'key: value'"]),
        ("", ["must hold lines 'key: value'"]),
    ],
)
def test_wrong_yaml(capsys, tmp_path, text, expected):
    (tmp_path / "ppo.yaml").write_text(text)
    fails(capsys, ["ppo", *REQUIRED["ppo"], f"--config={tmp_path}/ppo.yaml"], *expected)


def test_the_command_line_overrides_the_file_wherever_it_names_it(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nbf16: true\nstop_token: [a, b]\nkl_coef: 0.3")
    file = str(tmp_path / "a.yaml")
    given = ["--seed=2", "--bf16", "false", "--stop_token", "c"]
    for argv in (
        ["--config", file, *given],
        [*given, "--config", file],
        [*given[:1], f"--config={file}", *given[1:]],
    ):
        config = parse_config("ppo", [*REQUIRED["ppo"], *argv])
        assert (config.seed, config.bf16, config.stop_token, config.kl_coef) == (
            *(2, False, ["c"], 0.3),
        )


def test_values_that_begin_with_a_minus():
    argv = [*REQUIRED["ppo"], "--missing_eos_score", "-1e-3", "--stop_strings", "-1", "-x", "- y"]
    config = parse_config("ppo", [*argv, "--reward_weights", "-.5"])
    assert config.missing_eos_score == -1e-3
    assert config.stop_strings == ["-1", "-x", "- y"]
    assert config.reward_weights == [-0.5]


@pytest.mark.parametrize("stage", CONFIGURED)
def test_config_prints_a_file_of_all_defaults(stage, tmp_path, capsys):
    assert main(["config", stage]) == 0
    text = capsys.readouterr().out
    (tmp_path / "all.yaml").write_text(text)
    config_class = COMMANDS[stage].config
    required = [
        f"--{field.name}"
        for field in dataclasses.fields(config_class)
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    missing = f"missing {', '.join(required)}: give them"
    fails(capsys, [stage, f"--config={tmp_path}/all.yaml"], missing)
    read = parse_config(stage, [f"--config={tmp_path}/all.yaml", *REQUIRED[stage]])
    assert read == parse_config(stage, REQUIRED[stage])
    fields = dataclasses.fields(config_class)
    values = yaml.safe_load(text)
    assert sorted(values) == sorted(field.name for field in fields)
    for field in fields:
        if field.default is not dataclasses.MISSING:
            assert values[field.name] == field.default
    assert values.get("text_prompt_length", [2, 8]) == [2, 8]
    comments = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert max(map(len, text.splitlines())) <= 96
    for field in fields:
        assert field.metadata["help"] in comments
        assert text.count(f"# {field.metadata['section']} ---") == 1


def test_the_file_of_a_run_is_one_to_run(options, parse_yaml, tmp_path):
    argv = [*options("ppo")[1:], "--stop_strings=null", "--adam_epsilon=1e-9", "--reward_weights=2"]
    config = parse_config("ppo", argv)
    text = yaml.safe_dump(dataclasses.asdict(config))
    (tmp_path / "run.yaml").write_text(text)
    assert parse_config("ppo", ["--config", str(tmp_path / "run.yaml")]) == config


@pytest.mark.parametrize("command", CONFIGURED)
def test_every_option_is_documented(command):
    fields = dataclasses.fields(COMMANDS[command].config)
    assert all(len(field.metadata["help"]) > 10 for field in fields)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("stage", CONFIGURED)
def test_help(stage, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as stop:
        main([stage, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert width - 12 < max(map(len, lines)) <= width
    starts = [line.split()[0] for line in lines if line.startswith("  --")]
    fields = dataclasses.fields(COMMANDS[stage].config)
    assert sorted(starts) == sorted(["--config", *(f"--{field.name}" for field in fields)])
    headings = [line.removesuffix(":") for line in lines if line and line[0].isupper()]
    for field in fields:
        assert headings.count(field.metadata["section"]) == 1
    text = " ".join(" ".join(lines).split())
    assert "(required)" in text
    assert stage not in STAGES or "the model to start from. (required)" in text
    assert "(default: 64)" in text
    assert "(default: None)" not in text


def test_switches(options):
    argv = options("ppo")[1:]
    assert parse_config("ppo", argv).whiten_advantages
    assert not parse_config("ppo", [*argv, "--no_whiten_advantages"]).whiten_advantages
    assert not parse_config("ppo", [*argv, "--whiten_advantages", "false"]).whiten_advantages
    assert parse_config("ppo", [*argv, "--bf16"]).bf16


def test_a_switch_of_the_file_is_turned_round(parse_yaml):
    assert not parse_yaml("whiten_advantages: true", "--no_whiten_advantages").whiten_advantages
    assert parse_yaml("whiten_advantages: false", "--whiten_advantages").whiten_advantages
    assert not parse_yaml("whiten_advantages: false").whiten_advantages


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "did you mean --learning_rate?"]),
        (["--learning-rat=1"], ["--learning-rat:", "did you mean --learning_rate?"]),
        (["--no_learning_rate"], ["unknown option --no_learning_rate"]),
        (["sft.yaml"], ["unexpected argument 'sft.yaml'", "--config FILE"]),
        (["--learning_rate", "fast"], ["learning_rate", "'fast'"]),
        (["--learning_rate"], ["learning_rate", "expected one argument"]),
        (["--learning_rate", "-1"], ["learning_rate must be >= 0", "-1.0"]),
        (["--learning_rate", "-1e-5"], ["learning_rate must be >= 0", "-1e-05"]),
        (["--learning_rate", "nan"], ["learning_rate must be >= 0", "nan"]),
        (["--max_grad_norm", "0"], ["max_grad_norm must be > 0", "0.0"]),
        (["--lr_scheduler_type", "square"], ["lr_scheduler_type", "cosine", "'square'"]),
        (["--lr_scheduler_type", "a\nb"], ["lr_scheduler_type"]),
        (["--optim", "sgd"], ["optim must be one of", "adamw_tensorflow", "'sgd'"]),
        (["a\nb"], ["unexpected argument"]),
        (["--seed", str(2**70)], ["seed must be in [0, 2**32)"]),
        (["--per_device_train_batch_size", "0"], ["per_device_train_batch_size must be >= 1"]),
        (["--config", "nowhere.yaml"], ["cannot read nowhere.yaml"]),
        (["--config", "no\nwhere.yaml"], ["cannot read no where.yaml"]),
    ],
)
def test_wrong_options(options, capsys, extra, expected):
    fails(capsys, options("sft") + extra, *expected)


def test_a_file_that_is_not_utf_8(capsys, tmp_path):
    (tmp_path / "latin.yaml").write_bytes("output_dir: café".encode("latin-1"))
    fails(capsys, ["sft", "--config", str(tmp_path / "latin.yaml")], "cannot read", "utf-8")


def test_missing_options_are_named(capsys):
    names = ("--model_name_or_path", "--dataset_name", "--output_dir")
    fails(capsys, ["sft"], *names, "--config", "rlhf config sft")
    fails(capsys, ["ppo"], *names, "--config", "rlhf config ppo")


@pytest.mark.parametrize("argv", [["train"], ["--seed", "1"], ["config"], ["config", "demo"]])
def test_an_unknown_command_prints_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: rlhf" in capsys.readouterr().err


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


# Values


def test_ppo_ranges(options, capsys):
    fails(capsys, options("ppo", temperature=0), "temperature must be > 0", "0.0")
    fails(capsys, options("ppo", gamma=1.5), "gamma must be in [0, 1]", "1.5")
    fails(
        capsys,
        options("ppo", response_length=4, min_response_length=5),
        "min_response_length must be in [0, response_length = 4], got 5",
    )


def test_a_batch_must_be_divisible(options, capsys):
    argv = options("ppo", rollout_batch_size=20, num_mini_batches=2)
    fails(capsys, argv, "rollout_batch_size 20 must be a multiple", "8 * 2 * 1 = 16", "try 32")


def test_configurations_check_values_in_code_too(world):
    with pytest.raises(UserError, match=r"kl_coef must be >= 0 and finite, got -0\.1"):
        PPOConfig(
            model_name_or_path="a",
            reward_funcs=["b"],
            dataset_name="c",
            output_dir="d",
            kl_coef=-0.1,
        )


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
