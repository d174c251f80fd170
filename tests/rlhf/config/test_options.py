"""Options on the command line and in YAML files: their values, help and errors."""

import dataclasses
import json

import pytest
import yaml

from rlhf.cli import COMMANDS, CONFIGURED, STAGES, main, parse_config, sections
from rlhf.config.fields import SECTIONS
from rlhf.config.ppo import PPOConfig
from rlhf.demo.base import write_jsonl
from rlhf.errors import UserError
from tests.rlhf.helpers.command import fails

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
def parse_yaml(tmp_path):
    """A PPOConfig from the text of a file, after the required options."""

    def parse(text: str, *options: str) -> PPOConfig:
        (tmp_path / "ppo.yaml").write_text(text, encoding="utf-8")
        return parse_config("ppo", [*REQUIRED["ppo"], f"--config={tmp_path}/ppo.yaml", *options])

    return parse


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
