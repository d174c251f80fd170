"""`rlhf generate`: what the file holds, and one line for everything a user can get wrong."""

import json
import math
from datetime import date
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.config.inference import GenerateConfig
from rlhf.demo.base import write_jsonl
from rlhf.errors import UserError
from rlhf.inference.generate import run


@pytest.fixture
def config(world, tmp_path):
    def make(**changes) -> GenerateConfig:
        defaults = {
            "model_name_or_path": str(world / "llama"),
            "output_file": str(tmp_path / "out" / "answers.jsonl"),
            "response_length": 8,
            "overwrite": True,
        }
        if "prompt" not in changes:
            defaults["dataset_name"] = str(world / "prompts.jsonl")
        return GenerateConfig(**defaults | changes)

    return make


def test_the_file_holds_each_prompts_completions_one_after_the_other(config):
    rows = run(config(num_completions=8))
    lines = Path(config().output_file).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    prompts = ("film", "plot is", "film is good")
    assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(8)]
    for row in rows:
        assert list(row) == ["prompt", "completion", "tokens", "ended"]
        # One token a word, special ones left out; only EOS ends, and it counts.
        assert len(row["completion"].split()) <= row["tokens"] - row["ended"]
        assert row["ended"] or row["tokens"] == 8
    assert {row["ended"] for row in rows} == {True, False}
    assert len({row["completion"] for row in rows[:8]}) > 4


def test_one_seed_one_answer_in_whatever_batches(config):
    rows = run(config(num_completions=4))
    assert run(config(num_completions=4, per_device_eval_batch_size=5)) == rows
    assert run(config(num_completions=4, num_prompts=2)) == rows[:8]
    assert run(config(num_completions=4, seed=1)) != rows


def test_sampling_options_are_honoured(config):
    greedy = run(config(temperature=1e-4, num_completions=3))
    assert len({row["completion"] for row in greedy[:3]}) == 1
    long = run(config(min_response_length=8))
    assert all(row["tokens"] == 8 for row in long)


def test_prompts_from_the_command_line(world, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    argv = ["generate", f"--model_name_or_path={world / 'llama'}", f"--output_file={out}"]
    argv += ["--prompt", "film", "plot is", "--prompt", "film is good", "--response_length=4"]
    assert main(argv) == 0
    prompts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert prompts == ["film", "plot is", "film is good"]
    assert "3 completions" in capsys.readouterr().out
    content = out.read_bytes()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"output_file {out} exists" in error and "--overwrite" in error
    assert out.read_bytes() == content
    assert main([*argv, "--overwrite", "--seed=5"]) == 0


def test_other_columns_are_kept(config, world, tmp_path):
    rows = [{"prompt": "film", "id": 7, "meta": {"é": [1, None]}}, {"prompt": "plot", "id": 8}]
    write_jsonl(tmp_path / "data.jsonl", rows)
    answers = run(config(dataset_name=str(tmp_path / "data.jsonl"), num_completions=2))
    assert [row["id"] for row in answers] == [7, 7, 8, 8]
    assert [row["meta"] for row in answers] == [{"é": [1, None]}] * 2 + [None] * 2
    texts = run(config(dataset_name=str(world / "texts.jsonl"), num_prompts=3))
    assert all(row["text"].startswith(row["prompt"]) for row in texts)


def test_a_column_of_another_file_format_or_with_what_json_has_no_word_for(config, tmp_path):
    """Half a surrogate pair has no UTF-8, NaN no JSON: an escape, and null."""
    row = {"prompt": "film", "half": "\ud83d", "meta": {"x": [math.nan, math.inf, 1.5]}}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    run(config(dataset_name=str(tmp_path / "data.jsonl")))

    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    text = Path(config().output_file).read_text(encoding="utf-8")
    answer = json.loads(text, parse_constant=no_constant)
    assert answer["half"] == "\ud83d"
    assert answer["meta"] == {"x": [None, None, 1.5]}
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"prompt": ["film"], "day": [date(2026, 1, 2)]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "data.parquet")
    run(config(dataset_name=str(tmp_path / "data.parquet")))
    assert json.loads(Path(config().output_file).read_text())["day"] == "2026-01-02"


@pytest.mark.parametrize("folder", [".", "link"])
def test_the_data_set_is_never_replaced(config, tmp_path, folder):
    (tmp_path / "link").symlink_to(tmp_path)
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [{"prompt": "film"}])
    content = data.read_bytes()
    with pytest.raises(UserError, match=r"output_file .* must not be dataset_name .*data\.jsonl"):
        run(config(dataset_name=str(data), output_file=str(tmp_path / folder / "data.jsonl")))
    assert data.read_bytes() == content
    (tmp_path / "saved").mkdir()
    with pytest.raises(UserError, match=r"output_file .* must not be dataset_name .*, nor a file"):
        inside = str(tmp_path / folder / "saved" / "x" / "dataset_info.json")
        run(config(dataset_name=str(tmp_path / "saved"), output_file=inside))
    assert not [*(tmp_path / "saved").iterdir()]


def test_a_folder_that_takes_no_files_is_named_before_anything_is_sampled(config, monkeypatch):
    """Linux's own: nobody may write there, root neither."""
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    monkeypatch.setattr("rlhf.inference.generate.Policy", lambda *_: pytest.fail("too late"))
    for name in ("answers.jsonl", "new/answers.jsonl"):
        with pytest.raises(UserError, match=rf"cannot write output_file /proc/self/{name}: "):
            run(config(output_file=f"/proc/self/{name}"))


def test_a_reward_model_is_no_policy(config, world):
    for name in ("llama-reward", "gpt2-reward"):  # GPT-2's embeddings are tied: it lacks nothing
        with pytest.raises(UserError, match=rf"{name} is a .*, a reward model or a critic: give"):
            run(config(model_name_or_path=str(world / name)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["give one of prompt and dataset_name"]),
        (["--prompt=film", "--dataset_name=x.jsonl"], ["give one of prompt and dataset_name"]),
        (["--prompt", "film", "caf\udce9"], ["prompt must be valid Unicode", "'caf\\udce9'"]),
        (["--prompt=film", "--stop_strings=\udce9"], ["stop_strings must be valid Unicode"]),
        (["--dataset_name=nowhere.jsonl"], ["nowhere.jsonl does not exist"]),
        (["--prompt=film", "--num_completions=0"], ["num_completions must be >= 1, got 0"]),
        (["--prompt=film", "--response_length=64"], ["65 tokens", "64 positions"]),
        (["--prompt=film", "--stop_token=xyz"], ["stop_token 'xyz' is no token"]),
        (["--prompt=film", "--learning_rate=1"], ["unknown option --learning_rate"]),
        (["--prompt=film", "--model_name_or_path=nowhere/at/all"], ["no folder 'nowhere/at/all'"]),
        (["--dataset_name=taken.jsonl"], ["has a column 'completion'", "rename it"]),
        (["--prompt=film", "--output_file=."], ["is a folder"]),
        (["--prompt=film", "--output_file=taken.jsonl/x"], ["cannot write output_file"]),
        (
            ["--prompt=film", "--output_file=new/folder/x", "--stop_token=xyz"],
            ["stop_token 'xyz' is no token"],
        ),
    ],
)
def test_wrong_options(world, tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "taken.jsonl", [{"prompt": "film", "completion": "is good ."}])
    argv = ["generate", f"--model_name_or_path={world / 'llama'}", "--output_file=out.jsonl"]
    assert main([*argv, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("rlhf generate: error: ")
    assert all(part in error for part in expected), error
    assert [path.name for path in tmp_path.iterdir()] == ["taken.jsonl"]


def test_one_process(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate"]) == 2
    assert "generate runs in one process" in capsys.readouterr().err
