"""What is the user's stays: only what a run wrote is deleted, and only in a folder known as one."""

import json
import os
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.config.inference import EvaluateConfig, GenerateConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.training import SFTConfig
from rlhf.demo import command as demo
from rlhf.errors import UserError
from rlhf.inference.policy import check_output
from rlhf.ppo.metrics import PLOTS
from rlhf.report.page import write_report
from rlhf.run import folder as output_folder
from rlhf.run.checkpoints import open_run, rotate_checkpoints
from rlhf.run.folder import MARKER, claim_output_dir, kind_of
from tests.rlhf.helpers.checkpoints import save


@pytest.fixture
def claim(tmp_path):
    """Claims `tmp_path / "run"`, or another folder, for SFT."""

    def make(path: Path = tmp_path / "run", overwrite: bool = True, **changes) -> None:
        claim_output_dir(path, **{"kind": "sft", "overwrite": overwrite} | changes)

    return make


@pytest.fixture
def run(claim, tmp_path) -> Path:
    """A folder of SFT that holds what it writes, of every kind."""
    claim()
    files = [
        *("sft.yaml", "metrics.jsonl", "metrics.csv", "README.md", "loss.png", "report.html"),
        *("config.json", "generation_config.json", "model-00001-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "chat_template.jinja"),
        "tensorboard/events.out.tfevents.1.host.2.0",
    ]
    for folder in ("checkpoint-4", "stale-checkpoint-10"):
        files += [f"{folder}/{name}" for name in ("manifest.json", "state.pt", "config.json")]
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, links not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refusal(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_claimed_folder_holds_the_marker(claim, tmp_path):
    assert kind_of(tmp_path / "run") is None
    claim(overwrite=False)
    assert os.listdir(tmp_path / "run") == [MARKER]
    assert kind_of(tmp_path / "run") == "sft"
    claim(overwrite=False)  # nothing was begun in it


def test_a_run_is_replaced_whole(claim, run):
    for name in (".saving-checkpoint-8-0123456789abcdef", ".deleting-x-0123456789abcdef"):
        (run / name).mkdir()
        (run / name / "half").write_text("")
    claim()
    assert os.listdir(run) == [MARKER]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        *((x, x) for x in ("thesis.txt", ".git", "data.jsonl", "model.safetensors.bak")),
        *((x, x) for x in (".saving-money.txt", ".deleting-x", "checkpoint-best", "ppo.yaml")),
        *((x, x) for x in ("checkpoint-4/notes.txt", "critic/thesis.txt", "tensorboard/notes")),
        *((f"{x}/todo.md", x) for x in ("notes", "checkpoint-04", "completions.jsonl")),
    ],
)
def test_a_foreign_entry_keeps_everything(claim, run, name, named):
    """It is named, and nothing else is deleted either."""
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("years of work")
    before = contents(run)
    assert f"nothing is deleted, because {run / named} was not written by a run" in refusal(claim)
    assert contents(run) == before


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_links_are_foreign(claim, run, make):
    (run / "metrics.jsonl").unlink()
    make(run / "metrics.jsonl")
    assert "metrics.jsonl was not written by a run" in refusal(claim)
    assert os.path.lexists(run / "metrics.jsonl") and (run / "sft.yaml").exists()


@pytest.mark.parametrize("name", ["critic", "checkpoint-2", "tensorboard"])
def test_nothing_is_deleted_through_a_link(claim, run, tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "config.json").write_text("precious")
    (run / "tensorboard" / "events.out.tfevents.1.host.2.0").unlink()
    (run / "tensorboard").rmdir()
    (run / name).symlink_to(victim)
    assert f"{run / name} was not written by a run" in refusal(claim)
    assert (victim / "config.json").read_text() == "precious"


def test_a_link_in_what_a_kill_left_is_not_followed(claim, run, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    leftover = run / ".deleting-checkpoint-2-0123456789abcdef"
    leftover.mkdir()
    (leftover / "critic").symlink_to(victim)
    (run / ".saving-checkpoint-8-0123456789abcdef").symlink_to(victim)
    claim()
    assert os.listdir(run) == [MARKER]
    assert (victim / "thesis.txt").read_text() == "precious"


def test_a_linked_output_folder_is_that_folder(claim, run, tmp_path):
    """With the same rules."""
    (tmp_path / "link").symlink_to(run)
    (run / "thesis.txt").write_text("years of work")
    assert "thesis.txt" in refusal(lambda: claim(tmp_path / "link"))
    (run / "thesis.txt").unlink()
    claim(tmp_path / "link")
    assert os.listdir(run) == [MARKER]
    assert (tmp_path / "link").is_symlink()


def test_a_project_with_a_configuration_is_no_run(claim, tmp_path):
    """Not even one that has all the names of a run: there is no guess."""
    project = tmp_path / "run"
    project.mkdir()
    for name in ("sft.yaml", "README.md", "metrics.jsonl", "data.jsonl"):
        (project / name).write_text(name)
    before = contents(project)
    message = refusal(claim)
    assert f"holds no {MARKER}, by which a run is known" in message
    assert "if an earlier version, which wrote none, made it, remove it by hand" in message
    assert "earlier version" in refusal(lambda: claim(overwrite=False))
    assert contents(project) == before
    (project / "sft.yaml").unlink()
    assert "earlier version" not in refusal(claim)


@pytest.mark.parametrize("content", ["", "{}", "[]", "[" * 100_000, '{"format": "rlhf run 1"}'])
def test_only_the_program_s_marker_counts(claim, run, content):
    (run / MARKER).write_text(content)
    assert "holds no" in refusal(claim)
    assert (run / "sft.yaml").exists()
    (run / MARKER).unlink()
    os.mkfifo(run / MARKER)
    assert "holds no" in refusal(claim)


def test_another_kind_of_run_is_kept(claim, run):
    assert "it holds a run of sft, not of ppo" in refusal(lambda: claim(kind="ppo"))
    assert (run / "sft.yaml").exists()


@pytest.mark.parametrize("place", ["", "checkpoint-4"])
def test_the_current_folder_and_those_above_are_kept(claim, run, monkeypatch, place):
    monkeypatch.chdir(run / place)
    for path in (run, Path("." if place == "" else "..")):
        assert "it is the current folder, or above it" in refusal(lambda path=path: claim(path))
    assert (run / "sft.yaml").exists()


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(name, monkeypatch, tmp_path, capsys):
    """As `--output_dir "$OUT"` gives it where OUT is not set."""
    monkeypatch.chdir(tmp_path)
    config = SFTConfig(model_name_or_path="model", dataset_name="data", output_dir=name)
    assert "output_dir must name a folder" in refusal(lambda: open_run(config, "sft"))
    assert main(["demo", "--output_dir", name]) == 2
    assert "output_dir must name a folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_an_input_is_kept(run, tmp_path):
    """By any option, whether the input is the folder, in it or above it, or behind a link."""
    (tmp_path / "link").symlink_to(run)
    (run / "checkpoint-4" / "README.md").write_text("")
    defaults = {
        "model_name_or_path": "hub/model",
        "dataset_name": "hub/data",
        "reward_funcs": ["rlhf.demo.reviews:gold"],
        "output_dir": str(run),
        "overwrite_output_dir": True,
    }
    for changes in (
        {"model_name_or_path": str(run)},
        {"model_name_or_path": str(run / "checkpoint-4")},
        {"model_name_or_path": str(tmp_path / "link" / "checkpoint-4")},
        {"model_name_or_path": str(tmp_path)},
        {"critic_model_path": str(run)},
        {"dataset_name": str(run / "metrics.jsonl")},
        {"eval_dataset_name": os.path.relpath(run / "metrics.jsonl")},
        {"reward_funcs": ["hub/scorer", str(run / "checkpoint-4")]},
        {"reward_funcs": [f"{run / 'README.md'}:score"]},
    ):
        config = PPOConfig(**defaults | changes)
        (run / MARKER).write_text(json.dumps({"format": "rlhf run 1", "kind": "ppo"}))
        message = refusal(lambda config=config: open_run(config, "ppo"))
        assert next(iter(changes)) in message and "is read from there" in message
        assert (run / "sft.yaml").exists()


def test_a_run_does_not_go_on_in_a_project(tmp_path, monkeypatch):
    """Nor does it write its README.md over the user's."""
    (tmp_path / "sft.yaml").write_text("seed: 0")
    (tmp_path / "README.md").write_text("years of work")
    config = SFTConfig(
        model_name_or_path="model",
        dataset_name="data",
        output_dir=str(tmp_path),
        resume_from_checkpoint="auto",
    )
    before = contents(tmp_path)
    message = refusal(lambda: open_run(config, "sft"))
    assert "is not empty: choose another folder" in message and "earlier version" in message
    assert contents(tmp_path) == before


def start(path: Path, **changes):
    config = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": str(path)}
    return open_run(SFTConfig(**config | changes), "sft")


def test_a_checkpoint_with_something_of_the_user_s_is_not_rotated_away(tmp_path, capsys):
    run = start(tmp_path / "run")
    for step in (1, 2, 3):
        save(run, step)
    (run.output_dir / "checkpoint-1" / "thesis.txt").write_text("years of work")
    rotate_checkpoints(run.output_dir / "checkpoint-3", 1)
    (kept,) = run.output_dir.glob("kept-checkpoint-1-*")
    assert (kept / "thesis.txt").read_text() == "years of work"
    assert f"is kept as {kept.name}" in capsys.readouterr().out
    assert [*run.output_dir.glob("checkpoint-*")] == [run.output_dir / "checkpoint-3"]


def test_the_code_of_a_model_is_its_own(claim, run, monkeypatch):
    """transformers writes it beside a model whose class is in a file, and with it what it imports;
    other Python files are the user's."""
    auto_map = {"AutoConfig": "shape.Shape", "AutoModel": "modeling.Model", "AutoX": "hub--far.X"}
    (run / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    auto_map = {"AutoTokenizer": ["words.Words", None]}
    (run / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    imports = {"modeling": "from .layers import L\n", "layers": "from .shape import S\n"}
    for name in ("shape", "modeling", "layers", "words"):
        (run / f"{name}.py").write_text(imports.get(name, ""))
    (run / "far.py").write_text("")
    assert f"because {run / 'far.py'} was not written by a run" in refusal(claim)
    (run / "far.py").unlink()
    with monkeypatch.context() as patch:  # A kill when the first of them is gone.
        deleted, delete = [], output_folder._delete
        patch.setattr(output_folder, "_delete", lambda path: deleted.append(path) or delete(path))
        patch.setattr(Path, "rmdir", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            claim()
    assert {path.name for path in deleted} >= {"shape.py", "modeling.py", "layers.py", "words.py"}
    assert (run / "config.json").exists()
    claim()
    assert os.listdir(run) == [MARKER]


def test_code_that_cannot_be_read_is_foreign(claim, run):
    (run / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Model"}}))
    os.mkfifo(run / "modeling.py")
    assert "modeling.py was not written by a run" in refusal(claim)


@pytest.mark.parametrize("name", ["critic", "tensorboard"])
def test_a_run_that_goes_on_writes_through_no_link(tmp_path, name):
    run = start(tmp_path / "run")
    save(run, 1, best=None)
    (tmp_path / "victim").mkdir()
    (run.output_dir / name).symlink_to(tmp_path / "victim")
    message = refusal(lambda: start(tmp_path / "run", resume_from_checkpoint="auto"))
    assert f"{name} is a link" in message


def test_the_names_of_plots_are_known():
    from rlhf.run.folder import STAGES

    assert {f"{name}.png" for name in PLOTS} <= {p.replace("\\", "") for p in STAGES["ppo"]}


# The other commands


def test_a_demo_is_replaced_only_where_nothing_else_is(tmp_path):
    def begin(overwrite=True, inputs=()):
        demo.begin(tmp_path / "demo", {"seed": 0}, list(inputs), overwrite)

    begin(overwrite=False)
    for name in (
        "data/prompts.jsonl",
        "base/config.json",
        "sft/sft.yaml",
        "ppo/critic/config.json",
    ):
        (tmp_path / "demo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "demo" / name).write_text("")
    (tmp_path / "demo" / "ppo" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path / "demo")
    assert "ppo/thesis.txt was not written by a run" in refusal(begin)
    data = tmp_path / "demo" / "data" / "prompts.jsonl"
    assert "data" in refusal(lambda: begin(inputs=[("data", data)]))
    assert contents(tmp_path / "demo") == before
    (tmp_path / "demo" / "ppo" / "thesis.txt").unlink()
    begin()
    assert {*os.listdir(tmp_path / "demo")} == {MARKER, "demo.yaml"}


def test_a_report_replaces_no_file_of_the_user_s(tmp_path):
    run = start(tmp_path / "run")
    write_report(run.output_dir)
    write_report(run.output_dir)
    (run.output_dir / "report.html").write_text("years of work")
    assert "report.html is not replaced" in refusal(lambda: write_report(run.output_dir))
    assert (run.output_dir / "report.html").read_text() == "years of work"


def test_output_files_replace_no_input_and_no_device(tmp_path):
    """A file beside a model's is fine; one of its own is not."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    model.mkdir()
    for path in (model / "config.json", model / "answers.jsonl", data, tmp_path / "judge.py"):
        path.write_text("")
    os.mkfifo(tmp_path / "pipe")
    generate = {"model_name_or_path": str(model), "dataset_name": str(data), "overwrite": True}
    evaluate = {
        "policies": [str(model), str(model)],
        "reward_funcs": [f"{tmp_path / 'judge.py'}:judge"],
        "dataset_name": str(data),
        "overwrite": True,
    }
    configs = [
        GenerateConfig(output_file="unused", **generate),
        EvaluateConfig(output_file="unused.json", **evaluate),
    ]
    for config in configs:
        check_output(model / "answers.jsonl", config)
        for path in (data, model / "config.json", tmp_path / "pipe", Path("/dev/null")):
            message = refusal(lambda path=path, config=config: check_output(path, config))
            assert "must not be" in message or "not a regular file" in message
    message = refusal(lambda: check_output(tmp_path / "judge.py", configs[1]))
    assert "must not be reward_funcs" in message
