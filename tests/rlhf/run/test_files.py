"""Temporary files: names that nobody can foresee, nothing written through links, and writers that
do not disturb each other."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from rlhf.ppo.metrics import write_completions
from rlhf.run import files
from rlhf.run.files import (
    create,
    is_leftover,
    open_to_append,
    open_to_read,
    saving_name,
    write_file,
)
from rlhf.run.metrics import MetricsLog, plot_metrics


def test_temporary_names_are_new_each_time_and_known_as_leftovers(tmp_path):
    names = {saving_name(tmp_path / "a.json").name for _ in range(100)}
    assert len(names) == 100
    assert all(map(is_leftover, (tmp_path / name for name in names)))
    assert is_leftover(files.deleting_name(tmp_path / "checkpoint-4"))
    for name in (".saving-a.json", ".saving-money.txt", ".deleting-x", "a-0123456789abcdef"):
        assert not is_leftover(tmp_path / name)


@pytest.fixture
def victim(tmp_path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def test_nothing_is_written_through_a_planted_link(tmp_path, victim, monkeypatch):
    """Even if the name could be foreseen."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    saving_name(tmp_path / "a.json").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a.json", b"x")
    assert victim.read_text() == "precious"
    (tmp_path / "new").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        create(tmp_path / "new", b"x")


def test_a_link_in_a_file_s_place_is_replaced(tmp_path, victim):
    """By metrics, plots, tables and completions too."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("metrics.jsonl", "metrics.csv", "loss.png", "completions.md", "a.json"):
        (out / name).symlink_to(victim)
    write_file(out / "a.json", b"x")
    with MetricsLog(out, "sft", 1, "none", ()) as log:
        log.write(1, {"loss": 1.0})
    plot_metrics(out, {"loss": ("loss",)})
    write_completions(out, [])
    assert victim.read_text() == "precious"
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_are_not_added_through_a_link(tmp_path, victim):
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(OSError) as error:
        open_to_append(tmp_path / "metrics.jsonl")
    assert error.value.errno == errno.ELOOP


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a.json", b"x")
        with open_to_append(tmp_path / "metrics.jsonl"):
            pass
    finally:
        os.umask(before)
    for name in ("a.json", "metrics.jsonl"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """The file is always one writer's, whole, and no temporary one is left."""
    path, failures = tmp_path / "a.json", []
    contents = [bytes([number]) * 10_000 for number in range(4)]
    write_file(path, contents[0])

    def write(content: bytes) -> None:
        try:
            for _ in range(25):
                write_file(path, content)
                if path.read_bytes() not in contents:
                    failures.append("torn")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_temporary_file_that_a_new_run_cleans_away_is_written_again(tmp_path, monkeypatch):
    """As of `rlhf report` in a folder where a run starts."""
    replace, calls = os.replace, []

    def clean(source, target):
        calls.append(source)
        if len(calls) == 1:
            source.unlink()
        replace(source, target)

    monkeypatch.setattr(os, "replace", clean)
    write_file(tmp_path / "a.json", b"x")
    assert (tmp_path / "a.json").read_bytes() == b"x" and len(set(calls)) == 2


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_file(tmp_path / "a.json", b"earlier")
    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a.json", b"x")
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"earlier"


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            open_to_read(path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError):
            open_to_read(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
