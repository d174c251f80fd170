"""The configuration in a run's folder, and which of its options a run that goes on may change."""

from dataclasses import asdict, fields
from pathlib import Path, PurePath

import yaml

from rlhf.config.training import TrainConfig
from rlhf.config.yaml_files import PlainLoader
from rlhf.errors import UserError, one_line
from rlhf.run.files import read_file
from rlhf.run.folder import INPUT_OPTIONS

# Options that a resumed run may change, because no number of the training depends on them.
FREE_OPTIONS = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "resume_loosely"),
    *("report_to", "save_steps", "save_total_limit"),
    *("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
}
# Options that `resume_loosely` lets it change: batch sizes, how long it runs, and what it logs.
LOOSE_OPTIONS = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "rollout_batch_size"),
    *("num_mini_batches", "per_device_eval_batch_size", "gradient_checkpointing"),
    *("total_episodes", "num_train_epochs", "max_steps", "logging_steps", "eval_steps"),
}


def to_yaml(values: dict) -> bytes:
    try:
        return yaml.safe_dump(values, sort_keys=False).encode()
    except yaml.YAMLError as error:
        raise UserError(
            f"an option cannot be written as YAML ({one_line(error)}): give text, numbers, True or "
            "False, or lists of them"
        ) from error


def settings(config: TrainConfig) -> bytes:
    """A run's configuration as YAML, from which `rlhf <stage> --config` starts it anew."""
    anew = {
        "overwrite_output_dir": False,
        "resume_from_checkpoint": None,
        "resume_loosely": False,
    }
    return to_yaml(asdict(config) | anew)


def changed_options(config: TrainConfig, folder: Path, run_file: str) -> list[str]:
    """The options that have another value in `config` than in `folder / run_file`, each as "name
    here (there: value)", if `resume_loosely` allows all of them; raises UserError if not.

    FREE_OPTIONS do not count, nor INPUT_OPTIONS, whose contents are compared instead of their
    names. Options that this version added count as their default there.
    """
    there, here = _stored(config, folder, run_file), _plain(asdict(config))
    changed = [
        k for k in there if k not in FREE_OPTIONS and _known_by(k, there) != _known_by(k, here)
    ]
    loose = LOOSE_OPTIONS.issuperset(changed)
    if changed and not (loose and config.resume_loosely):
        name, *others = changed
        also = f" (also: {', '.join(others)})" if others else ""
        loosely = "go on without the bitwise promise with --resume_loosely, " if loose else ""
        raise UserError(
            f"{folder} belongs to another configuration: {name} is {there[name]!r} there and "
            f"{here[name]!r} here{also}: give the same values, {loosely}or start anew in another "
            "output_dir"
        )
    return [f"{name} {here[name]} (there: {there[name]})" for name in changed]


def _known_by(option: str, values: dict) -> object:
    """What a resumed run must have in common with the earlier one in this option's value: of names
    of data and models nothing, of reward functions, of which no content is compared, all but the
    folder of a file."""
    if option == "reward_funcs":
        return [_function(name) for name in values[option]]
    return None if option in INPUT_OPTIONS else values[option]


def _function(name: str) -> str | None:
    """A reward function without the folder of its file; None for a model."""
    place, _, function = name.rpartition(":")
    if not place or Path(name).is_dir():
        return None
    return f"{PurePath(place).name}:{function}" if place.endswith(".py") else name


def _stored(config: TrainConfig, folder: Path, run_file: str) -> dict:
    """The configuration in `folder / run_file`, as plain values."""
    known = {field.name for field in fields(config)}
    try:
        stored = yaml.load(read_file(folder / run_file), PlainLoader)
        for name, value in stored.items():
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(x, str | int | float | None) for x in items):
                raise ValueError(f"{name} is {value!r:.60}")
        gone = [name for name, value in stored.items() if name not in known and value is not None]
        there = asdict(type(config)(**{k: v for k, v in stored.items() if k in known}))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no {run_file}, so it does not belong to a run of this kind: give one "
            f"of `rlhf {PurePath(run_file).stem}`"
        ) from error
    except (
        *(OSError, ValueError, TypeError, AttributeError, RecursionError),
        yaml.YAMLError,
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot read the configuration {folder / run_file}: {reason:.200}: start anew in "
            "another output_dir"
        ) from error
    if gone:
        raise UserError(
            f"{folder} was written by another version, which had the option {gone[0]}: go on with "
            "that version, or start anew in another output_dir"
        )
    return _plain(there)


def _plain(values: dict) -> dict:
    """As they come back from YAML."""
    return yaml.load(to_yaml(values), PlainLoader)
