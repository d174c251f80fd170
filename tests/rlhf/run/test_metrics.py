"""metrics.jsonl and .csv, TensorBoard, the display, the plots, and PPO's completions."""

import csv
import io
import json
import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf.errors import UserError
from rlhf.ppo.train import compare_completions, train_ppo
from rlhf.ppo.trainer import PPOTrainer
from rlhf.reward_model import train_reward
from rlhf.run import metrics as module
from rlhf.run.metrics import MetricsLog, plot_metrics
from rlhf.run.progress import Display, num_passes
from rlhf.sft import train_sft
from tests.rlhf.helpers.world import GOOD


def make_log(folder, total=10, report_to="none", **changes) -> MetricsLog:
    return MetricsLog(folder, "ppo", total, report_to, ("loss",), **changes)


def records(folder) -> list[dict]:
    def no_constant(name):
        raise ValueError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in lines]


def test_a_new_run_begins_the_file_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"st')
    with make_log(tmp_path) as log:
        log.write(1, {"loss": 0.1, "lr": 1e-5})
        assert records(tmp_path) == [{"step": 1, "loss": 0.1, "lr": 1e-5}]


def test_a_resumed_run_adds_to_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with make_log(tmp_path, step=2) as log:
        log.write(3, {"loss": 0.5})
    assert records(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_floats_come_back_bitwise(tmp_path):
    values = {"a": 1 / 3, "b": 1e-320, "c": -0.0, "d": 2.0**100 + 2.0**60}
    with make_log(tmp_path) as log:
        log.write(1, values)
    (record,) = records(tmp_path)
    assert {name: record[name].hex() for name in values} == {k: v.hex() for k, v in values.items()}


def test_values_that_are_not_finite_are_null(tmp_path):
    with make_log(tmp_path, report_to="tensorboard") as log:
        log.write(1, {"loss": math.nan, "ratio": math.inf, "kl": -math.inf, "lr": 0.5})
    assert records(tmp_path) == [{"step": 1, "loss": None, "ratio": None, "kl": None, "lr": 0.5}]


def test_the_time_left_counts_the_steps_of_this_session_only(tmp_path, monkeypatch, capsys):
    clock = iter([100.0, 106.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with make_log(tmp_path, step=4) as log:
        assert log.progress.tasks[0].completed == 4
        log.advance()
        log.advance()
        log.write(6, {"loss": 2.0, "lr": 0.1})  # 2 steps in 6 s, and 4 to come
        assert log.progress.tasks[0].completed == 6
    assert capsys.readouterr().out == "ppo 6/10  loss 2  eta 12s\n"


def test_tensorboard_forgets_what_an_unfinished_run_reported_of_later_steps(tmp_path):
    with make_log(tmp_path, report_to="tensorboard") as log:
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": float(step)})
    with make_log(tmp_path, report_to="tensorboard", step=2) as log:
        for step in (3, 4):
            log.write(step, {"loss": 10.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_only_the_main_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with make_log(tmp_path, report_to="tensorboard") as log:
        log.advance()
        log.write(1, {"loss": 1.0})
    assert not [*tmp_path.iterdir()]
    assert capsys.readouterr().out == ""


def test_the_error_that_ends_a_run_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    def open_full(path):
        return open("/dev/full", "w")

    monkeypatch.setattr(module, "open_to_append", open_full)
    full = f"cannot write metrics to {tmp_path}: No space left on device: free some space"
    with pytest.raises(UserError, match=full), make_log(tmp_path) as log:
        log.write(1, {"loss": 1.0})
    with pytest.raises(KeyError, match="first"), make_log(tmp_path) as log:
        log.file.write("{}")
        raise KeyError("first")
    with pytest.raises(UserError, match=full), make_log(tmp_path) as log:
        log.file.write("{}")


def test_files_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write metrics to .*: Is a directory: "):
        make_log(tmp_path)
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(UserError, match=r"cannot draw .*loss\.png: Is a directory: "):
        plot_metrics(tmp_path, {"loss": ("loss",)})


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list]:
    """The points of each panel by its title, as they were drawn."""
    panels = {}

    class Figure(module.Figure):
        def savefig(self, *args, **kwargs):
            for axes in self.axes:
                panels[axes.get_title()] = axes.lines[0].get_xydata().tolist()
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(module, "Figure", Figure)
    return panels


def test_plots_leave_out_what_has_no_value(tmp_path, drawn):
    with make_log(tmp_path) as log:
        log.write(1, {"loss": 1.0, "kl": math.nan})
        log.write(2, {"loss": math.inf, "kl": math.nan})
        log.write(3, {"loss": 3.0, "lr": 0.0})
    plot_metrics(tmp_path, {"a": ("loss", "kl", "lr"), "b": ("kl", "absent")})
    assert drawn == {"loss": [[1, 1], [3, 3]], "lr": [[3, 0]]}
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert not (tmp_path / "b.png").exists()


# metrics.csv


def table(folder) -> list[list[str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_the_table_has_a_row_for_each_step_and_a_column_for_each_metric(tmp_path):
    with make_log(tmp_path) as log:
        log.write(1, {"loss": 1 / 3, "lr": 1e-5})
        log.write(2, {"loss": math.nan, "lr": 2e-5})
        log.write(2, {"eval/loss": 0.5, 'a, "b"': 2.0})
        assert not (tmp_path / "metrics.csv").exists()
    assert table(tmp_path) == [
        ["step", "loss", "lr", "eval/loss", 'a, "b"'],
        ["1", repr(1 / 3), "1e-05", "", ""],
        ["2", "", "2e-05", "0.5", "2.0"],
    ]


def test_the_table_of_a_resumed_run_is_that_of_the_whole_run(tmp_path):
    with make_log(tmp_path) as log:
        log.write(1, {"loss": 1.0})
    with make_log(tmp_path, step=1) as log:
        log.write(2, {"loss": 2.0})
    assert table(tmp_path) == [["step", "loss"], ["1", "1.0"], ["2", "2.0"]]


def test_a_run_that_an_error_ended_has_a_table(tmp_path):
    with pytest.raises(KeyError), make_log(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        log.file.write('{"step": 2, "lo')  # as a full disk leaves it
        raise KeyError
    assert table(tmp_path) == [["step", "loss"], ["1", "1.0"]]


# The display


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """What is shown on a terminal."""
    shown = io.StringIO()
    shown.isatty = lambda: True
    make = partial(Console, file=shown, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr("rlhf.run.progress.Console", make)
    return shown


def test_a_phase_counts_calls_and_leaves_no_hook(tmp_path, terminal):
    layer, x = torch.nn.Linear(2, 2), torch.zeros(1, 2)
    with make_log(tmp_path) as log:
        log.advance()
        log.write(1, {"loss": 0.5})
        with log.phase("update", 5, layer.register_forward_hook):
            for _ in range(3):
                assert layer(x).shape == (1, 2)
            log.live.refresh()
        layer(x)
        assert log.progress.tasks[1].completed == 3
        with pytest.raises(KeyError), log.phase("score", 7, layer.register_forward_hook):
            raise KeyError
        log.write(2, {"loss": 0.25})
        log.live.refresh()
        assert not layer._forward_hooks
    text = terminal.getvalue()
    assert "update" in text and "3/5" in text and "1/10" in text
    assert "score" in text and "0/7" in text
    last = [line for line in text.splitlines() if "loss" in line][-1]
    assert last.replace("│", " ").split() == ["loss", "0.5", "0.25"]


@pytest.mark.parametrize(
    ("isatty", "environment"),
    [(True, {"TERM": "dumb"}), (False, {"TERM": "xterm", "FORCE_COLOR": "1"})],
)
def test_what_cannot_be_redrawn_gets_plain_lines(
    tmp_path, monkeypatch, capsys, isatty, environment
):
    file = io.StringIO()
    file.isatty = lambda: isatty
    make = partial(Console, file=file, _environ=environment)
    monkeypatch.setattr("rlhf.run.progress.Console", make)
    with make_log(tmp_path) as log:
        log.write(1, {"loss": 0.5})
        assert capsys.readouterr().out.startswith("ppo 1/10  loss 0.5  eta ")
    assert file.getvalue() == ""


def test_where_nothing_is_shown_a_phase_costs_nothing(tmp_path):
    layer = torch.nn.Linear(2, 2)
    with make_log(tmp_path) as log, log.phase("update", 5, layer.register_forward_hook):
        assert not layer._forward_hooks


def test_passes_of_a_process():
    assert [num_passes(count, 4, 1) for count in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    assert [num_passes(count, 4, 2) for count in (4, 5, 9, 16)] == [1, 1, 2, 2]


@pytest.fixture
def phases(monkeypatch, terminal) -> dict[str, list[tuple[int, int]]]:
    """Of each phase by name, how often it came how far: (calls counted, total)."""
    found = {}
    phase = Display.phase

    @contextmanager
    def watched(self, name, total, register):
        with phase(self, name, total, register):
            yield
        found.setdefault(name, []).append((self.progress.tasks[1].completed, total))

    monkeypatch.setattr(Display, "phase", watched)
    return found


def test_the_phases_of_ppo_come_to_their_ends(world, ppo_config, tmp_path, phases, terminal):
    train_ppo(
        ppo_config(
            output_dir=str(tmp_path / "ppo"),
            eval_dataset_name=str(world / "prompts.jsonl"),
            eval_steps=1,
            min_response_length=8,
        )
    )
    assert phases["generate"] == [(8, 8)] * 2  # a pass for each token
    assert phases["score"] == [(2, 2)] * 2  # two micro-batches
    assert phases["update"] == [(4, 4)] * 2  # optimizer steps
    assert phases["eval"] == [(9, 9)] * 2  # the same, and a micro-batch
    assert "ppo completions" in terminal.getvalue()
    assert "16/16" in terminal.getvalue()


def test_the_main_process_counts_what_it_alone_does(ppo_config, tmp_path, monkeypatch):
    options = {"min_response_length": 8, "per_device_eval_batch_size": 2}
    trainer = PPOTrainer(ppo_config(output_dir=str(tmp_path), **options))
    monkeypatch.setenv("WORLD_SIZE", "2")
    stages = []

    class Watched(Display):
        def __exit__(self, *error):
            stages.append((self.progress.tasks[0].completed, self.progress.tasks[0].total))

    monkeypatch.setattr("rlhf.ppo.train.Display", Watched)
    compare_completions(trainer)
    assert stages == [(32, 32)]  # two models, 3 prompts in two parts, 8 tokens


def test_the_phases_of_sft_and_reward_come_to_their_ends(
    world, sft_config, reward_config, tmp_path, phases, terminal
):
    train_sft(
        sft_config(
            output_dir=str(tmp_path / "sft"),
            max_steps=1,
            eval_dataset_name=str(world / "texts.jsonl"),
        )
    )
    assert phases == {"eval": [(7, 7)]}  # 400 texts, 64 at a time
    assert "rlhf sft --config" in (tmp_path / "sft" / "README.md").read_text()
    phases.clear()
    train_reward(reward_config(output_dir=str(tmp_path / "reward"), max_steps=1))
    assert phases == {"eval": [(7, 7)]}
    assert "rlhf reward --config" in (tmp_path / "reward" / "README.md").read_text()
    assert "reward scale" in terminal.getvalue()


# Completions before and after


@pytest.fixture
def judge(tmp_path) -> str:
    (tmp_path / "judge.py").write_text(
        f"def good(completions):\n"
        f"    return [sum(map(text.split().count, {GOOD})) or None for text in completions]\n"
    )
    return f"{tmp_path / 'judge.py'}:good"


def run_for_completions(config) -> tuple[list[dict], str]:
    train_ppo(config)
    folder = module.Path(config.output_dir)
    lines = (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], (folder / "completions.md").read_text()


def test_completions_of_a_policy_that_did_not_learn_are_the_references(
    world, ppo_config, judge, tmp_path
):
    rewards = [*ppo_config(output_dir="").reward_funcs, judge]
    pairs, text = run_for_completions(
        ppo_config(
            output_dir=str(tmp_path / "ppo"),
            dataset_name=str(world / "texts.jsonl"),
            reward_funcs=rewards,
            reward_weights=[1, 0.5],
            learning_rate=0.0,
            total_episodes=16,
        )
    )
    assert len(pairs) == 128 and text.count("- after [") == 16
    for pair in pairs:
        assert pair["before"] == pair["after"]
        answer = pair["before"]
        assert list(answer) == ["completion", "tokens", "ended", "score", "rewards"]
        good = sum(map(answer["completion"].split().count, GOOD)) or None
        assert answer["rewards"] == {"reward": answer["rewards"]["reward"], "good": good}
        total = answer["rewards"]["reward"] + 0.5 * (good or 0)
        assert answer["score"] == pytest.approx(total, abs=1e-5)
        assert len(answer["completion"].split()) <= answer["tokens"] - answer["ended"]
    assert {pair["before"]["ended"] for pair in pairs} == {True, False}
    assert any(pair["before"]["rewards"]["good"] is None for pair in pairs)


def test_completions_are_of_held_out_prompts_if_there_are_any(world, ppo_config, tmp_path):
    pairs, _ = run_for_completions(
        ppo_config(
            output_dir=str(tmp_path / "ppo"),
            dataset_name=str(world / "texts.jsonl"),
            eval_dataset_name=str(world / "prompts.jsonl"),
            learning_rate=1e-2,
            total_episodes=16,
        )
    )
    assert [pair["prompt"] for pair in pairs] == ["film", "plot is", "film is good"]
    assert [pair["before"] for pair in pairs] != [pair["after"] for pair in pairs]
    assert all("rewards" not in pair["before"] for pair in pairs)


@pytest.mark.parametrize(("report_to", "pages"), [("tensorboard", 1), ("none", 0)])
def test_the_report_is_made_last_of_all(ppo_config, tmp_path, monkeypatch, report_to, pages):
    there = []
    monkeypatch.setattr(
        "rlhf.ppo.train.write_report",
        lambda folder: there.append({x.name for x in folder.iterdir()}),
    )
    output_dir = tmp_path / "ppo"
    train_ppo(ppo_config(output_dir=str(output_dir), total_episodes=16, report_to=report_to))
    made = {"model.safetensors", "critic", "metrics.jsonl", "metrics.csv", "reward.png"}
    made |= {"completions.jsonl", "completions.md", "README.md"}
    assert len(there) == pages
    assert all(made <= names for names in [*there, {x.name for x in output_dir.iterdir()}])
