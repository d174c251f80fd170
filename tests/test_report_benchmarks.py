"""python -m benchmarks.report: a run's JSON in, tables, page and plots out."""

import json
import sys

import pytest

from benchmarks import plots, report
from benchmarks.figures import GOALS, goals_of, read

CPU = {"processor": "Testium 9", "gpu": None, "threads": 2, "backend": "auto", "torch": "2.13.0"}
GPU = CPU | {"gpu": "Testium X100"}


def benchmark(op, shape, seconds=1e-3, dtype="float32", **info):
    info |= {"op": op, "shape": list(shape), "dtype": dtype}
    return {"name": f"test_{op}", "extra_info": info, "stats": {"median": seconds}}


LOSS = benchmark("ppo_loss_", (512, 32000), copies=0.9, times_eager=10.0, memory=0.0005)


@pytest.fixture
def write(tmp_path):
    def write(*benchmarks, machine=CPU, name="machine.json", **more):
        path = tmp_path / name
        run = {"machine_info": machine, "benchmarks": list(benchmarks), **more}
        path.write_text(json.dumps(run), encoding="utf-8")
        return path

    return write


@pytest.fixture
def made(monkeypatch, capsys):
    """made(*files): runs the command; returns the terminal's text and the first file's page.

    Plots, which take long, are drawn where a test says so.
    """
    plotted = plots.PLOTS

    def made(*files, draws=()):
        monkeypatch.setattr(plots, "PLOTS", {name: plotted[name] for name in draws})
        monkeypatch.setattr(sys, "argv", ["report", *map(str, files)])
        report.main()
        return capsys.readouterr().out, files[0].with_suffix(".md").read_text(encoding="utf-8")

    return made


def rows(page, what):
    return [line for line in page.splitlines() if line.startswith(f"| {what}")]


def test_goals_are_marked(write, made):
    """Goals: copies ≤ 1.3, × eager ≥ 20, × torch.compile ≥ 6, extra memory ≤ 0.001."""
    terminal, page = made(write(LOSS))
    assert rows(page, "ppo_loss_ 512 × 32,000 fp32") == [
        "| ppo_loss_ 512 × 32,000 fp32: copies | ≤ 1.3 | 0.90 | met |",
        "| ppo_loss_ 512 × 32,000 fp32: × eager | ≥ 20 | 10.00 | **not met** |",
        "| ppo_loss_ 512 × 32,000 fp32: × torch.compile | ≥ 6 | not measured | – |",
        "| ppo_loss_ 512 × 32,000 fp32: extra memory | ≤ 0.001 | 0.00050 | met |",
    ]
    count = sum(map(len, GOALS.values()))
    assert f"2 of {count} goals met, 1 not met, {count - 3} not measured." in page
    assert f"2 of {count} goals reached" in terminal
    assert "ppo_loss_ 512 × 32,000 fp32: × eager 10.00, goal ≥ 20" in terminal
    (row,) = rows(page, "`ppo_loss_`")
    assert "| 0.90 ≤ 1.3 ✓ | 10.00 ≥ 20 ✗ | not measured, ≥ 6 | 0.00050 ≤ 0.001 ✓ |" in row
    assert "| kl_divergence 512 × 32,000 fp32: copies | ≤ 1.6 | not measured | – |" in page


@pytest.mark.parametrize(("machine", "n"), [(CPU, 512), (GPU, 8192)], ids=["cpu", "gpu"])
def test_goals_are_the_same_whatever_was_measured(write, machine, n):
    """An op over logits has them in fp32 and bf16, any other in fp32."""

    def goals(*benchmarks):
        return [(g.what, g.goal) for g in goals_of(read(write(*benchmarks, machine=machine)))]

    fp32, bf16 = (
        benchmark("ppo_loss", (n, 32000), dtype=dtype, copies=1.0)
        for dtype in ("float32", "bfloat16")
    )
    assert goals() == goals(fp32) == goals(bf16) == goals(fp32, bf16)
    names = [what for what, _ in goals()]
    size = f"ppo_loss {n:,} × 32,000"
    assert [what for what in names if what.startswith(size)] == [
        f"{size} fp32: copies",
        f"{size} bf16: copies",
    ]
    others = "gae", "linear_ppo_loss", "PPO iteration", "token_logprobs "
    assert all("fp32: " in what for what in names if what.startswith(others))


def test_a_goal_reached_exactly_is_met(write):
    run = read(write(benchmark("ppo_loss", (512, 32000), copies=1.8)))
    assert next(g for g in goals_of(run) if g.what.startswith("ppo_loss 512")).reached


@pytest.mark.parametrize(("faster", "time", "mark"), [(0.8, "1.25", "✗"), (0.9, "1.11", "✓")])
def test_time_in_units_of_a_part(write, made, faster, time, mark):
    """The part takes `faster` times as long as the whole: the whole 1 / `faster` of it."""
    linear = benchmark("linear_ppo_loss", (2048, 512, 128256), times_matmuls=faster)
    statistics = benchmark("token_statistics", (512, 32000), times_logprobs=faster)
    _, page = made(write(linear, statistics))
    assert f"| {time} ≤ 1.15 {mark} |" in rows(page, "`linear_ppo_loss`")[0]
    assert f"| {time} ≤ 1.15 {mark} |" in rows(page, "`token_statistics`")[0]


def test_phases_of_an_iteration(write, made):
    """The goal is of one variant only."""
    measured = {
        "phase_seconds": {"sample": 0.5, "evaluate": 0.25, "update": 1.25},
        "phase_tokens_per_second": {"update": 4000.0},
        "peak_mb": 900.0,
    }
    small, wide = (
        benchmark("PPO iteration", (64, 64), variant=f"V = {V}", **measured)
        for V in ("1,024", "32,000, from logits")
    )
    _, page = made(write(small, wide))
    small, wide = rows(page, "`PPO iteration, V = ")
    assert "| 0.50 | 0.25 | 1.25 ≤ 1.2 ✗ | 4,000 | 900 |" in small
    assert "| 0.50 | 0.25 | 1.25 | 4,000 | 900 |" in wide


def test_goals_of_a_gpu_are_others(write, made):
    loss = benchmark("ppo_loss_", (8192, 32000), copies=1.15, call_us=9.0)
    loss["extra_info"] |= {"gb_per_s": 1000.0, "copy_gb_per_s": 2000.0}
    _, page = made(write(loss, machine=GPU))
    assert page.startswith("# Speed and memory on Testium X100")
    assert "| 1.15 ≤ 1.08 ✗ |" in page
    assert "| 50% |" in page
    assert "linear_ppo_loss" not in page


def test_rows_that_are_not_aligned_have_goals_of_their_own(write):
    goals = {g.what: g.goal for g in goals_of(read(write(machine=GPU)))}
    assert goals["ppo_loss_ 8,192 × 50,257 bf16: copies"] == "≤ 1.15"
    assert goals["ppo_loss_ 133 × 50,257 bf16: copies"] == "≤ 1.2"
    assert goals["ppo_loss_ 8,192 × 128,256 bf16: copies"] == "≤ 1.08"


def test_what_was_not_measured_and_why(write, made):
    del (loss := json.loads(json.dumps(LOSS)))["extra_info"]["memory"]
    loss["extra_info"] |= {"memory_not_measured": "no compiler", "peers_failed": "ImportError: x"}
    left_out = [{"name": "test_x", "reason": "it does not fit"}]
    terminal, page = made(write(loss, left_out=left_out))
    assert rows(page, "ppo_loss_ 512 × 32,000 fp32: extra memory") == [
        "| ppo_loss_ 512 × 32,000 fp32: extra memory | ≤ 0.001 | not measured | no compiler |"
    ]
    for text in (terminal, page):
        assert "test_x: it does not fit" in text
        assert "peers of test_ppo_loss_: ImportError: x" in text


def test_an_empty_run(write, made):
    path = write()
    _, page = made(path, draws=plots.PLOTS)
    assert "Nothing was measured." in page
    assert "0 of " in page and "met |" not in page
    assert not path.with_suffix("").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"benchmarks": []}',
        '{"machine_info": null, "benchmarks": []}',
        # another project's
        '{"machine_info": {}, "benchmarks": [{"extra_info": {}, "stats": {"median": 1}}]}',
    ],
)
def test_a_file_that_is_no_run_is_named(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    with pytest.raises(SystemExit):
        report.main()
    assert f"{path} must hold the JSON of `pytest benchmarks`" in capsys.readouterr().err


def test_backends_of_a_machine_share_a_page(write, made):
    native = write(LOSS, machine=CPU | {"backend": "native"}, name="machine-native.json")
    other = write(
        LOSS, machine=CPU | {"processor": "Testium 8", "backend": "triton"}, name="other.json"
    )
    again = write(LOSS, name="zagain.json")
    _, page = made(write(LOSS), native, other, again)
    assert "# Backend auto" in page and "# Backend native" in page
    assert not native.with_suffix(".md").exists()
    assert "Testium 8" in other.with_suffix(".md").read_text()
    assert again.with_suffix(".md").exists()  # another run with the same backend


def test_the_same_run_gives_the_same_files(write, made):
    path = write(LOSS, benchmark("ppo_loss_", (1, 32000), copies=1.0))
    contents = []
    for _ in range(2):
        _, page = made(path, draws=["tokens"])
        contents.append([page, (path.with_suffix("") / "tokens.png").read_bytes()])
    assert "a copy of the logits](machine/tokens.png)" in page
    assert contents[0] == contents[1]


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda fig, path: figures.append(fig) or True)
    return figures


def test_plotted_figures(write, drawn, tmp_path):
    """Copies of a baseline: ours times how often we are faster. Of a vocabulary's sizes the one at
    which most was measured."""
    small = benchmark("ppo_loss_", (64, 32000), 1e-4, copies=2.0, times_eager=5.0)
    compiled = benchmark("ppo_loss_", (512, 32000), 8e-4, copies=1.5, times_eager=4.0)
    compiled["extra_info"] |= {"times_compile": 2.0, "memory": 0.25, "memory_eager": 5.0}
    run = read(write(small, compiled))
    for draw in plots.PLOTS.values():
        assert draw([run], tmp_path / "x.png")
    copies, memory, tokens = (fig.axes[0] for fig in drawn)
    assert [bar.get_height() for bar in copies.patches] == [1.5, 6.0, 3.0]
    assert [bar.get_height() for bar in memory.patches] == [0.25, 5.0]
    lines = {line.get_label(): list(line.get_ydata()) for line in tokens.lines}
    assert lines["ppo_kernels (auto)"] == pytest.approx([0.1, 0.8])
    assert lines["eager"] == pytest.approx([0.5, 3.2])
    assert lines["copy"] == pytest.approx([0.05, 0.8 / 1.5])


def test_one_size_is_no_curve(write, drawn, tmp_path):
    assert not plots.tokens([read(write(LOSS))], tmp_path / "x.png")
    assert not drawn
