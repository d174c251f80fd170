"""metrics.jsonl, TensorBoard, the display and the plots."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf import metrics as module
from rlhf.errors import UserError
from rlhf.metrics import MetricsLog, plot_metrics


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


def test_the_error_that_ends_a_run_is_not_hidden_by_a_full_disk(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
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
