"""The model card: what it says is so, and the code in it runs."""

import math
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from rlhf.cli import main
from rlhf.ppo.train import train_ppo
from rlhf.report.card import write_card


@pytest.fixture(scope="module")
def policy(ppo_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ppo") / "policy"
    config = ppo_config(output_dir=str(path), response_length=6, temperature=0.5)
    write_card(path, "ppo", config, train_ppo(config))
    return path


@pytest.fixture(scope="module")
def scorer(trained_reward, reward_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cards") / "scorer"
    shutil.copytree(trained_reward, path)
    write_card(path, "reward", reward_config(output_dir=str(path)), {"accuracy": 0.75})
    return path


def gold(prompts, completions, **columns) -> list[float]:
    return [float(len(text)) for text in completions]


judge = gold  # a reward's name is its function's, not that by which it is found


def prose(folder: Path) -> str:
    return " ".join((folder / "README.md").read_text(encoding="utf-8").split())


def run_code(folder: Path, prompt: str, monkeypatch) -> dict:
    """Runs the code of a card in its folder, on words of the tests' world; returns its names."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert '"The film' in code
    monkeypatch.chdir(folder)
    names = {}
    exec(re.sub(r'"The film[^"]*"', repr(prompt), code), names)
    return names


def test_policys_card_has_its_front_matter_and_links_that_lead_somewhere(policy):
    card = ModelCard.load(policy / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["rlhf", "ppo", "ppo_kernels"]
    assert card.data.base_model is None and card.data.datasets is None
    assert card.text.startswith("\n# policy\n")
    assert "from `sft` and learnt from `prompts.jsonl` for `reward`" in card.text
    links = re.findall(r"\]\(([^)]+)\)", card.text)
    assert {"ppo.yaml", "metrics.jsonl", "critic", "reward.png", "policy.png"} <= set(links)
    assert all((policy / link).exists() for link in links)


def test_what_the_card_tells_to_repeat_a_run_repeats_it(
    ppo_config, trained_reward, world, tmp_path, monkeypatch
):
    """With relative paths, too, which begin where the run was started."""
    monkeypatch.chdir(world)
    config = ppo_config(
        dataset_name="prompts.jsonl",
        output_dir=os.path.relpath(tmp_path / "first"),
        total_episodes=16,
        reward_funcs=[str(trained_reward), f"{__name__}:judge"],
        reward_weights=[1.0, 0.0],
    )
    train_ppo(config)
    text = prose(tmp_path / "first")
    assert "for `reward`, judged by `gold`, with seed" in text
    (command,) = re.findall(r"`(rlhf ppo [^`]+)`", text)
    assert "FOLDER" in command and "started where this run was: relative paths" in text
    command = command.replace("FOLDER", config.output_dir).replace("ANOTHER", str(tmp_path / "two"))
    assert main(command.split()[1:]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("named", [False, True])
def test_rewards_given_in_python_are_not_said_to_be_in_the_file(
    named, ppo_config, trained_reward, tmp_path
):
    config = ppo_config(
        output_dir=str(tmp_path / "run"),
        total_episodes=16,
        reward_funcs=[str(trained_reward), f"{__name__}:gold"] if named else [],
        reward_weights=[0.0, 1.0],
    )
    train_ppo(config, [str(trained_reward), gold])
    text = prose(tmp_path / "run")
    assert "learnt from `prompts.jsonl` for `gold`, judged by `reward`, with seed" in text
    assert "given in Python, not as options, are in no file." in text and "ANOTHER" not in text
    assert "| Gold score, of the reward gold, unweighted | `rewards/gold` |" in text


def test_no_local_path_is_told(policy, scorer):
    for folder in (policy, scorer):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert str(folder.parent) not in text and not re.search(r"(?<![\w.])/\w+/", text)


def test_policys_code_samples_as_it_was_trained(policy, monkeypatch):
    names = run_code(policy, "film is", monkeypatch)
    text = (policy / "README.md").read_text()
    assert "temperature=0.5, max_new_tokens=6" in text
    prompt = names["inputs"]["input_ids"].shape[1]
    assert prompt < names["output"].shape[1] <= prompt + 6


def test_reward_models_code_prints_its_score_also_normalised(scorer, monkeypatch, capsys):
    good = run_code(scorer, "film is good great .", monkeypatch)["score"]
    bad = run_code(scorer, "film is bad weak .", monkeypatch)["score"]
    assert good > bad
    printed = [float(number) for number in capsys.readouterr().out.split()]
    config = yaml.safe_load((scorer / "config.json").read_text())
    expected = (good - config["reward_mean"]) / config["reward_std"]
    assert printed[:2] == pytest.approx([good, expected], rel=1e-5)
    assert "critic" not in (scorer / "README.md").read_text().split("## Limits")[0]


def test_names_of_the_hub_are_given_and_a_figure_that_is_none_is_a_dash(sft_config, tmp_path):
    config = sft_config(
        model_name_or_path="openai-community/gpt2", dataset_name="stanfordnlp/imdb", output_dir="x"
    )
    metrics = {"loss": 1.23456, "lr": math.nan, "grad_norm": None, "eval/loss": 2.0}
    write_card(tmp_path, "sft", config, metrics)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.datasets == "stanfordnlp/imdb"
    rows = dict(re.findall(r"\| `(\S+)` \| (\S+) \|", card.text))
    assert rows == {"loss": "1.235", "lr": "–", "grad_norm": "–", "eval/loss": "2"}
    assert "![" not in card.text
