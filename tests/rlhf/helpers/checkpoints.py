"""Checkpoints as a run saves them, and kills in the middle of what it does."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from rlhf.run import files
from rlhf.run.checkpoints import Run, save_checkpoint
from rlhf.run.folder import MARKER
from rlhf.run.manifest import Best, read_manifest

WEIGHTS = "model.safetensors"
SMALL = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def write_parts(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "critic").mkdir()
    (folder / "critic" / "model.safetensors").write_bytes(b"critic")


def save(run: Run, step: int, write=write_parts, best: int | None = None) -> Path:
    """A checkpoint as a run saves it: with a line of metrics for every step so far."""
    lines = [json.dumps({"step": s}) + "\n" for s in range(1, step + 1)]
    (run.output_dir / "metrics.jsonl").write_text("".join(lines))
    name = None if best is None else f"checkpoint-{best}"
    return save_checkpoint(run, step, write, Best("loss", False, name))


def step_of(run: Run) -> int:
    """Steps that the checkpoint has behind it from which the run goes on."""
    return read_manifest(run.checkpoint).step


def unlock() -> None:
    """As the end of the process does it."""
    while files._locks:
        os.close(files._locks.popitem()[1])


def names(folder: Path) -> set[str]:
    """Without the marker, which every claimed folder holds."""
    return {path.name for path in folder.iterdir()} - {MARKER}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def kill_at(call: int) -> None:
    """From here on, kills this process at its `call`-th change of the file system or fsync; what it
    would write then is written by half."""
    left = [call]

    def watched(function, writes=False):
        def call_or_die(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if writes:
                    path, content = args
                    function(path, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call_or_die

    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    files.create = watched(files.create, writes=True)
    Path.write_text = watched(Path.write_text, writes=True)
    shutil.copyfile = watched(shutil.copyfile)


def killed(action, call: int) -> bool:
    """Whether `action` in a child process came to its `call`-th change, where it was killed."""
    pid = os.fork()
    if pid == 0:
        kill_at(call)
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


class Vocabulary:
    """A tokenizer for tests that do not tokenize."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
