"""The folders that runs write to: by what they are known, and what in them is a run's own.

A folder that a run has claimed holds the marker MARKER. Nothing is deleted but names that a run
writes, in a folder with the marker; anything else there is the user's, and keeps all of it.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import ppo_kernels
from rlhf.errors import UserError
from rlhf.run.files import disk_errors, is_leftover, lock_folder, read_file, remove, write_file

MARKER = ".rlhf-run.json"
FORMAT = "rlhf run 1"
METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
CARD_FILE = "README.md"
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
STATE_FILE = "state.pt"
MANIFEST = "manifest.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
# Options that name what a run reads, if that is on this machine.
INPUT_OPTIONS = (
    *("model_name_or_path", "critic_model_path", "policies", "reward_funcs"),
    *("dataset_name", "eval_dataset_name"),
)

# A folder's contents: regular expression of a name -> the contents of that folder, None for a file.
Contents = dict[str, "Contents | None"]


def _files(*names: str) -> Contents:
    return dict.fromkeys(map(re.escape, names))


MODEL = {
    **_files("config.json", "generation_config.json"),
    **_files("model.safetensors", "model.safetensors.index.json"),
    r"model-\d{5}-of-\d{5}\.safetensors": None,
    # Of tokenizers, whatever their class.
    **_files("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    **_files("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
    **_files("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
    **_files("spm_char.model", "entity_vocab.json", "emoji.json", "dict.txt", "byte_maps.json"),
    **_files("prophetnet.tokenizer", "chat_template.jinja"),
    "additional_chat_templates": {r"[^/]+\.jinja": None},
}


CHECKPOINT = {
    **MODEL,
    "critic": MODEL,
    **_files("sft.yaml", "reward.yaml", "ppo.yaml", METRICS_FILE, MANIFEST, STATE_FILE),
}


def _stage(name: str) -> Contents:
    return {
        **MODEL,
        "critic": MODEL,
        **_files(f"{name}.yaml", METRICS_FILE),
        **_files(MARKER, "metrics.csv", CARD_FILE, REPORT_FILE),
        **_files(COMPLETIONS_FILE, "completions.md"),
        **_files("loss.png", "policy.png", "responses.png", "reward.png"),
        "tensorboard": {r"events\.out\.tfevents\.[^/]+": None},
        f"(stale-)?{CHECKPOINT_NAME.pattern}": CHECKPOINT,
    }


STAGES = {name: _stage(name) for name in ("sft", "reward", "ppo")}
DATA = _files(
    *("texts.jsonl", "reviews.jsonl", "prompts.jsonl", "eval_prompts.jsonl"),
    *("pairs.jsonl", "heldout_pairs.jsonl", "rankings.jsonl", "heldout_rankings.jsonl"),
)
KINDS = STAGES | {
    "demo": {
        **_files(MARKER, "demo.yaml", SUMMARY_FILE, REPORT_FILE),
        "base": MODEL,
        "data": DATA,
        **STAGES,
    }
}


def is_run_name(name: str) -> bool:
    """Tells whether a stage writes a file or a folder of this name into its output folder."""
    return any(re.fullmatch(pattern, name) for stage in STAGES.values() for pattern in stage)


def output_path(name: str | Path) -> Path:
    """The path of an output folder; an empty name, as of a shell's variable that is not set, would
    be the current folder."""
    if not str(name).strip():
        raise UserError(f"output_dir must name a folder, got {str(name)!r}")
    return Path(name)


def kind_of(folder: Path) -> str | None:
    """The kind of run that has claimed the folder: sft, reward, ppo or demo; None if none has."""
    marker = folder / MARKER
    try:
        if marker.is_symlink():
            return None
        found = json.loads(read_file(marker))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return None
    kind = found.get("kind")
    return kind if isinstance(kind, str) and kind in KINDS else None


def claim_output_dir(
    path: Path,
    *,
    kind: str,
    overwrite: bool,
    inputs: Iterable[tuple[str, str | Path]] = (),
    go_on: str = "",
) -> None:
    """Makes `path` an empty folder for a new run of this kind, with the marker, and locks it.

    A folder that holds more than what a kill left half done is refused; with `overwrite` a run of
    this kind in it is deleted, if nothing else is there and it has nothing to do with `inputs`,
    which are options and the paths they name. `go_on` tells how to go on with such a run, where
    that is possible: "go on with ..., ".
    """
    with disk_errors(f"write to output_dir {path}", "choose another folder"):
        if path.exists() and not path.is_dir():
            raise UserError(f"output_dir {path} is a file: choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        lock_folder(path)
        entries = list(path.iterdir())
        if kind_of(path) is not None:
            entries.remove(path / MARKER)
        if not all(map(is_leftover, entries)):
            if not overwrite:
                raise UserError(f"output_dir {path} is not empty: {_remedy(path, kind, go_on)}")
            _check_replaceable(path, kind, inputs)
            # First goes what a run is resumed by, so that half of one never is; the marker stays.
            remove(path / f"{kind}.yaml")
            own_code_first = sorted(
                own_paths(path, KINDS[kind]), key=lambda own: own.suffix != ".py"
            )
            for own in own_code_first:
                if own.name != MARKER or own.parent != path:
                    _delete(own)
        for leftover in filter(is_leftover, list(path.iterdir())):
            remove(leftover)
        marker = {"format": FORMAT, "kind": kind, "version": ppo_kernels.__version__}
        write_file(path / MARKER, (json.dumps(marker) + "\n").encode())


def _remedy(path: Path, kind: str, go_on: str) -> str:
    if kind_of(path) == kind:
        return f"{go_on}choose another folder, or replace the run in it with --overwrite_output_dir"
    return f"choose another folder{unknown_run(path, kind)}"


def unknown_run(path: Path, kind: str) -> str:
    """Adds a hint to an error where the folder may be that of a run, but is not known as one."""
    if kind_of(path) is not None or not (path / f"{kind}.yaml").exists():
        return ""
    return (
        f" (it has a {kind}.yaml but no {MARKER}, by which a run is known: if an earlier version, "
        "which wrote none, made it, remove it by hand)"
    )


def _check_replaceable(path: Path, kind: str, inputs: Iterable[tuple[str, str | Path]]) -> None:
    """Raises UserError unless all there is in the folder is a run of this kind."""
    folder, found = path.resolve(), kind_of(path)
    start = f"output_dir {path} is not overwritten: "
    if found is None:
        raise UserError(
            f"{start}it holds no {MARKER}, by which a run is known: choose another folder"
            f"{unknown_run(path, kind)}"
        )
    if found != kind:
        raise UserError(f"{start}it holds a run of {found}, not of {kind}: choose another folder")
    if Path.cwd().is_relative_to(folder):
        raise UserError(
            f"{start}it is the current folder, or above it: start from elsewhere, or choose "
            "another folder"
        )
    for option, name in inputs:
        places = {Path(name).resolve(), Path(os.path.abspath(name))}
        if any(x.is_relative_to(folder) or folder.is_relative_to(x) for x in places):
            raise UserError(
                f"{start}{option} {name} is read from there: choose another folder, or copy it "
                "elsewhere"
            )
    own_paths(path, KINDS[kind])
    for entry in path.iterdir():
        if kind_of(entry) is not None:  # a stage of a demo, in which a run may go on
            lock_folder(entry)


def own_paths(folder: Path, contents: Contents) -> list[Path]:
    """All that is below the folder, what a folder holds before itself.

    Raises UserError, which names it, if anything there is not among `contents`; so is a link, which
    no run makes. What a kill left half done stands for all that it holds.
    """
    paths = []
    if MODEL.items() <= contents.items():
        contents = contents | _files(*_code_of_model(folder))
    for entry in sorted(folder.iterdir()):
        patterns = (p for p in contents if re.fullmatch(p, entry.name))
        pattern = next(patterns, None)
        if is_leftover(entry):
            paths.append(entry)
        elif pattern is None or entry.is_symlink():
            raise _foreign(entry)
        elif contents[pattern] is None:
            if not entry.is_file():
                raise _foreign(entry)
            paths.append(entry)
        elif entry.is_dir():
            paths += [*own_paths(entry, contents[pattern]), entry]
        else:
            raise _foreign(entry)
    return paths


def _code_of_model(folder: Path) -> set[str]:
    """Names of the Python files that `save_pretrained` writes beside a model or a tokenizer whose
    class is in such a file, as `auto_map` tells, and of those that they import."""
    modules = set()
    for name in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            auto_map = json.loads(read_file(folder / name))["auto_map"]
            modules |= set(re.findall(r'"(\w+)\.\w+"', json.dumps(auto_map)))
    files = {f"{module}.py" for module in modules}
    unread = [*files]
    while unread:
        file = folder / unread.pop()
        if file.is_file():
            from transformers.dynamic_module_utils import get_relative_imports

            imported = {f"{module}.py" for module in get_relative_imports(file)} - files
            files |= imported
            unread += imported
    return files


def _foreign(entry: Path) -> UserError:
    return UserError(
        f"nothing is deleted, because {entry} was not written by a run: move it elsewhere, or "
        "choose another folder"
    )


def _delete(path: Path) -> None:
    """Deletes a path of `own_paths`; what came into a folder since then keeps it."""
    if path.is_dir() and not is_leftover(path):
        path.rmdir()
    else:
        remove(path)


def local_inputs(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Of the values of options those that are paths on this machine, of a reward function its file,
    each with its option."""
    found = []
    for option in INPUT_OPTIONS:
        names = values.get(option) or []
        for name in [names] if isinstance(names, str) else names:
            path = name if os.path.exists(name) else name.rpartition(":")[0]
            if path and os.path.exists(path):
                found.append((option, path))
    return found
