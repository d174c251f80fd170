"""Output folders: claimed once, written beside and renamed, never overwritten unasked."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import TrainConfig
from rlhf.errors import UserError


def claim_output_dir(path: str | Path, *, run_file: str, overwrite: bool) -> Path:
    """Makes `path` an empty folder for a new run.

    `run_file` is the file by which a run of this kind is known. A folder that holds anything is
    refused; with `overwrite` it is emptied, if what it holds is a run of this kind.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file: choose another folder")
    try:
        if path.exists() and any(path.iterdir()):
            if not overwrite:
                raise UserError(
                    f"output_dir {path} is not empty: choose another folder, or replace the run "
                    "in it with --overwrite_output_dir"
                )
            if not (path / run_file).exists():
                raise UserError(
                    f"output_dir {path} holds no {run_file}, so it is not an earlier run of this "
                    "kind and is not overwritten: choose another folder"
                )
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to output_dir {path}: {error}") from error
    return path


def start_run(config: TrainConfig, stage: str) -> Path:
    """Claims the output folder and writes the configuration there, as `rlhf <stage>` reads it."""
    run_file = f"{stage}.yaml"
    path = claim_output_dir(
        config.output_dir, run_file=run_file, overwrite=config.overwrite_output_dir
    )
    values = asdict(config) | {"overwrite_output_dir": False}
    write_run_file(path / run_file, values)
    return path


def write_run_file(path: Path, values: dict) -> None:
    """Writes the settings by which a run is known, as YAML."""
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to output_dir {path.parent}: {error}") from error


def save_model(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model and tokenizer into the folder `path`, complete or not at all.

    They are written to a temporary folder inside `path` and moved from there file by file, and
    `config.json`, without which `from_pretrained` opens nothing, is moved last.
    """
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, path / file.name)
    temporary.rmdir()
