"""`rlhf demo` end to end, in the smallest size that goes through every stage."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rlhf.cli import main
from rlhf.demo import command as demo
from rlhf.demo.labelled import LABELS
from rlhf.errors import UserError
from tests.rlhf.helpers.demo import REVIEWS, check_models, examples, write

LABELLED = demo.LabelledSizes(
    num_prompts=32,
    num_eval_prompts=20,
    vocab_size=400,
    hidden_size=32,
    num_layers=1,
    sft_epochs=1,
    reward_epochs=0.5,
    total_episodes=128,
)


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory):
    rows = [
        {"text": f"{text} and more of the same", "label": LABELS[positive]}
        for text, positive in examples(200)
    ]
    return write(tmp_path_factory.mktemp("data") / "texts.jsonl", rows)


@pytest.fixture(scope="module")
def reviews_run(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "reviews"
    return output_dir, demo.run_demo(output_dir, 3, REVIEWS)


def test_reviews_run_leaves_a_summary_and_models_that_open(reviews_run):
    output_dir, summary = reviews_run
    assert json.loads((output_dir / "summary.json").read_text()) == summary
    assert summary["seed"] == 3 and summary["seconds"] > 0
    assert 0 <= summary["reward"]["accuracy"] <= 1
    assert set(summary["ppo"]) == {"gold_before", "gold_after", "kl"}
    assert all(-1 <= summary["ppo"][name] <= 1 for name in ("gold_before", "gold_after"))
    assert 0 < summary["ppo"]["kl"] < 20
    assert set(summary["stage_seconds"]) >= {"sft", "reward", "ppo"}
    check_models(output_dir)


def test_stages_and_evaluation_share_no_prompt(reviews_run):
    data = reviews_run[0] / "data"
    rankings, heldout, prompts, evaluation, texts = (
        [json.loads(line) for line in (data / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("rankings", "heldout_rankings", "prompts", "eval_prompts", "reviews")
    )
    assert all(len(row["ranking"]) == 4 for row in rankings + heldout)
    openings = [row["prompt"] for row in rankings + heldout + prompts + evaluation]
    assert len(openings) == len(set(openings)) == 32 + 8 + 32 + REVIEWS.num_eval_prompts
    assert not any(row["text"].startswith(tuple(openings)) for row in texts)


def ppo_metrics(folder) -> list[dict]:
    """Without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if "time/" not in k and "second" not in k} for line in lines
    ]


def test_gold_rides_along_and_changes_no_number(reviews_run, tmp_path):
    """The run goes through `ppo.yaml` once more, with the reward model alone."""
    output_dir, _ = reviews_run
    arguments = ["ppo", "--config", str(output_dir / "ppo" / "ppo.yaml")]
    arguments += ["--reward_funcs", str(output_dir / "reward"), "--reward_weights", "1"]
    assert main([*arguments, "--output_dir", str(tmp_path / "alone")]) == 0
    with_gold, alone = ppo_metrics(output_dir / "ppo"), ppo_metrics(tmp_path / "alone")
    gold = [line.pop("rewards/gold") for line in with_gold]
    assert all(-1 <= value <= 1 for value in gold) and any(gold)
    assert with_gold == alone
    weights = [
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (output_dir / "ppo", tmp_path / "alone")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_is_replaced_only_when_asked_and_only_by_its_kind(reviews_run, labelled_file):
    output_dir, _ = reviews_run
    with pytest.raises(UserError, match="overwrite_output_dir"):
        demo.run_demo(output_dir, 0, REVIEWS)
    with pytest.raises(UserError, match="not overwritten"):
        demo.run_demo(output_dir / "sft", 0, REVIEWS, overwrite_output_dir=True)
    assert (output_dir / "summary.json").exists() and (output_dir / "sft" / "sft.yaml").exists()


def test_labelled_run(labelled_file, tmp_path):
    output_dir = tmp_path / "labelled"
    demo.begin(output_dir, {"seed": 0}, [], overwrite_output_dir=False)  # and was interrupted
    summary = demo.run_demo(output_dir, 0, LABELLED, data=labelled_file, overwrite_output_dir=True)
    assert json.loads((output_dir / "summary.json").read_text()) == summary
    assert summary["judge"]["accuracy"] > 0.9
    assert set(summary["ppo"]) == {"judge_before", "judge_after", "kl"}
    assert all(0 <= summary["ppo"][name] <= 1 for name in ("judge_before", "judge_after"))
    assert 0 < summary["ppo"]["kl"] < 20
    assert all(0 <= line["rewards/gold"] <= 1 for line in ppo_metrics(output_dir / "ppo"))
    settings = yaml.safe_load((output_dir / "ppo" / "ppo.yaml").read_text())
    assert settings["reward_funcs"] == [] and len(settings["reward_weights"]) == 2
    card = (output_dir / "ppo" / "README.md").read_text(encoding="utf-8")
    assert "for `reward`, judged by `gold`, with seed" in card
    assert "given in Python" in card and "--config" not in card
    check_models(output_dir)
    parts = [
        {row[column] for row in map(json.loads, (output_dir / "data" / name).open())}
        for name, column in (("pairs.jsonl", "chosen"), ("heldout_pairs.jsonl", "chosen"))
    ]
    assert parts[0].isdisjoint(parts[1])


def test_wrong_data_file_costs_no_earlier_run(reviews_run, tmp_path, capsys):
    output_dir, _ = reviews_run
    options = ["--output_dir", str(output_dir), "--overwrite_output_dir"]
    assert main(["demo", "--data", str(tmp_path / "none.jsonl"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none.jsonl does not exist" in error
    assert main(["demo", "--seed", "-1", *options]) == 2
    inside = output_dir / "data" / "reviews.jsonl"
    assert main(["demo", "--data", str(inside), *options]) == 2
    assert inside.exists()
    assert (output_dir / "summary.json").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--task", "reviews", "--data", "x.jsonl"], "data is for task labelled, got task reviews"),
        (["--task", "counting", "--data", "x.jsonl"], "got task counting"),
        (["--task", "labelled"], "with --data"),
        (["--task", "cartpole", "--bf16"], "bf16 is for tasks reviews and labelled"),
        (["--seeds", "3"], "seeds must be 1 for task reviews, got 3"),
        (["--data", "x.jsonl", "--seeds", "2"], "seeds must be 1 for task labelled"),
        (["--task", "counting", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--task", "counting", "--seed", "-1"], "seed must be in [0, 2**32)"),
        (["--task", "counting", "--seed", str(2**32 - 1), "--seeds", "2"], "the 2 seeds"),
    ],
)
def test_contradicting_options_are_one_line(options, named, tmp_path, capsys):
    output_dir = tmp_path / "run"
    assert main(["demo", *options, "--output_dir", str(output_dir)]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not output_dir.exists()


def test_without_gymnasium_the_message_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "rlhf.demo.cartpole", raising=False)
    assert main(["demo", "--task", "cartpole", "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert 'pip install "ppo-kernels[gym]"' in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("worst", "code", "verdict"), [(475.0, 0, "3 of 3"), (474.9, 1, "2 of 3")])
def test_every_seed_is_held_against_the_threshold(
    worst, code, verdict, tmp_path, capsys, monkeypatch
):
    returns = {5: 490.0, 6: worst, 7: 500.0}
    task = SimpleNamespace(
        THRESHOLD=475.0, run_cartpole=lambda seed: {"return": returns[seed], "seconds": 1.5}
    )
    monkeypatch.setitem(sys.modules, "rlhf.demo.cartpole", task)
    arguments = ["demo", "--task", "cartpole", "--seed", "5", "--seeds", "3"]
    arguments += ["--output_dir", str(tmp_path / "run")]
    assert main(arguments) == code
    shown = capsys.readouterr().out
    assert f"{verdict} seeds reach 475" in shown and "cartpole 2/3" in shown
    assert shown.count("FAIL") == code
    runs = [{"seed": seed, "return": value, "seconds": 1.5} for seed, value in returns.items()]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == {"task": "cartpole", "threshold": 475.0, "runs": runs}
    assert main(arguments) == 2 and "overwrite_output_dir" in capsys.readouterr().err
    assert main([*arguments, "--overwrite_output_dir"]) == code


def test_command_runs_the_reviews_by_default_with_the_figures_of_the_seed(
    reviews_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo, "ReviewsSizes", lambda: REVIEWS)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    report = Path("runs", "demo", "report.html")
    assert f"Report: {report}" in shown and report.exists()
    for figure in ("reward.accuracy", "ppo.gold_before", "ppo.gold_after", "ppo.kl"):
        assert figure in shown
    summary = json.loads(Path("runs", "demo", "summary.json").read_text())
    assert all(summary[key] == reviews_run[1][key] for key in ("seed", "reward", "ppo"))
