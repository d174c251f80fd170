"""The configuration in a run's folder, and what of it a run that goes on may change."""

from pathlib import Path

import pytest
import yaml

from rlhf.config.training import SFTConfig
from rlhf.errors import UserError
from rlhf.run.checkpoints import open_run
from tests.rlhf.helpers.checkpoints import one_line, save, step_of


def test_a_damaged_checkpoint_is_refused_by_name(run, make_config, tmp_path):
    path = save(run, 2)
    (path / "model.safetensors").unlink()
    for config in (
        make_config(resume_from_checkpoint=str(path)),
        make_config(resume_from_checkpoint=str(path), output_dir=str(tmp_path / "new")),
    ):
        with pytest.raises(UserError) as error:
            open_run(config, "ppo")
        assert one_line(error) == (
            f"cannot go on from {path}: model.safetensors is missing: give a whole checkpoint, or "
            "--resume_from_checkpoint auto, which skips damaged ones"
        )
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="there is no such folder"):
        open_run(make_config(resume_from_checkpoint="nowhere"), "ppo")


def test_a_checkpoint_of_another_configuration_is_refused(run, make_config, tmp_path):
    path = save(run, 2)
    for changes, folder in (
        ({"resume_from_checkpoint": "auto"}, path),
        ({"resume_from_checkpoint": str(path)}, path),
        ({"resume_from_checkpoint": str(path), "output_dir": str(tmp_path / "new")}, path),
    ):
        with pytest.raises(UserError) as error:
            open_run(make_config(**changes, kl_coef=0.2, seed=1), "ppo")
        assert one_line(error) == (
            f"{folder} belongs to another configuration: seed is 0 there and 1 here (also: "
            "kl_coef): give the same values, or start anew in another output_dir"
        )
    with pytest.raises(UserError, match=r"kl_coef is 0\.05 there and 0\.2 here: give"):
        open_run(make_config(resume_from_checkpoint="auto", kl_coef=0.2), "ppo")


def test_options_that_change_no_number_may_change(run, make_config):
    path = save(run, 2)
    config = make_config(
        resume_from_checkpoint="auto",
        save_steps=7,
        save_total_limit=9,
        report_to="none",
        metric_for_best_model="loss",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    assert open_run(config, "ppo").checkpoint == path


def test_options_that_this_version_added_count_as_their_default(run, make_config):
    stored = yaml.safe_load((run.output_dir / "ppo.yaml").read_text())
    del stored["kl_coef"], stored["cliprange_high"]  # the latter's default is cliprange's value
    (run.output_dir / "ppo.yaml").write_text(yaml.safe_dump(stored))
    save(run, 2)
    assert step_of(open_run(make_config(resume_from_checkpoint="auto"), "ppo")) == 2
    with pytest.raises(UserError, match=r"cliprange_high is 0\.2 there and 0.3 here"):
        open_run(make_config(resume_from_checkpoint="auto", cliprange_high=0.3), "ppo")
    (run.output_dir / "ppo.yaml").write_text(yaml.safe_dump(stored | {"magic": 2}))
    save(run, 3)
    another = "written by another version, which had the option magic: go on with that version"
    with pytest.raises(UserError, match=another):
        open_run(make_config(resume_from_checkpoint="auto"), "ppo")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rlhf.tasks.reviews:gold", "rlhf.demo.reviews:gold"),
        ("rlhf.recipes.sentiment:me/it", "examples/imdb/sentiment.py:me/it"),
    ],
)
def test_a_run_goes_on_whose_reward_function_has_moved(run, make_config, old, new):
    """Under the name that stands in its configuration, and under the new one."""
    stored = yaml.safe_load((run.output_dir / "ppo.yaml").read_text())
    (run.output_dir / "ppo.yaml").write_text(yaml.safe_dump(stored | {"reward_funcs": [old]}))
    save(run, 2)
    for name in (old, new, new.replace("examples/imdb", "elsewhere")):
        config = make_config(resume_from_checkpoint="auto", reward_funcs=[name])
        assert step_of(open_run(config, "ppo")) == 2
    assert make_config(reward_funcs=[old]).reward_funcs == [new]
    with pytest.raises(UserError, match="belongs to another configuration: reward_funcs is"):
        open_run(make_config(resume_from_checkpoint="auto", reward_funcs=["mine:gold"]), "ppo")


@pytest.mark.parametrize(
    "text", ["é", "\x85", "\ud800", "\x00", "\u2028", "🙂", "no", "1e3", "null", "~", "", "a: b #c"]
)
def test_every_text_comes_back_from_the_configuration(make_config, text):
    # Not a path, of which some are expanded or refused.
    changes = {"metric_for_best_model": text}
    run = open_run(make_config(**changes), "ppo")
    assert (
        save(run, 1)
        == open_run(make_config(**changes, resume_from_checkpoint="auto"), "ppo").checkpoint
    )
    stored = yaml.safe_load((run.output_dir / "ppo.yaml").read_text())
    assert stored["metric_for_best_model"] == text


def test_a_path_object_is_as_good_as_its_text(make_config, tmp_path):
    config = make_config(
        output_dir=tmp_path / "run", dataset_name=Path("data.jsonl"), reward_funcs=[Path("reward")]
    )
    assert config == make_config()
    open_run(config, "ppo")


def test_options_that_cannot_be_written_touch_nothing(make_config, tmp_path):
    with pytest.raises(UserError, match="cannot be written as YAML") as error:
        open_run(make_config(dataset_name=object()), "ppo")
    one_line(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "a: [", "3", "seed: 1"])
def test_a_configuration_that_cannot_be_read(run, make_config, content):
    (run.output_dir / "ppo.yaml").write_text(content)
    with pytest.raises(UserError, match="cannot read the configuration") as error:
        open_run(make_config(resume_from_checkpoint="auto"), "ppo")
    one_line(error)


def test_a_checkpoint_of_another_stage_is_refused(run, tmp_path):
    path = save(run, 2)
    config = SFTConfig(
        model_name_or_path="model",
        dataset_name="data.jsonl",
        output_dir=str(tmp_path / "sft"),
        resume_from_checkpoint=str(path),
    )
    with pytest.raises(UserError, match=r"holds no sft\.yaml.*`rlhf sft`") as error:
        open_run(config, "sft")
    one_line(error)


def test_to_overwrite_and_to_go_on_are_two_things(make_config):
    config = make_config(resume_from_checkpoint="auto", overwrite_output_dir=True)
    with pytest.raises(UserError, match="give one of them"):
        open_run(config, "ppo")
