"""A folder that a run has locked is that run's alone, and only as long as it runs."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.demo import command as demo
from rlhf.errors import UserError
from rlhf.run import files
from rlhf.run.checkpoints import open_run
from rlhf.run.files import lock_folder
from rlhf.run.folder import MARKER
from tests.rlhf.helpers.checkpoints import one_line

# One run in a folder


IN_ANOTHER_PROCESS = """
import sys
from rlhf.run.checkpoints import open_run
from rlhf.config.ppo import PPOConfig

config = PPOConfig(
    model_name_or_path="model",
    dataset_name="data.jsonl",
    reward_funcs=["reward"],
    output_dir=sys.argv[1],
    resume_from_checkpoint="auto",
)
open_run(config, "ppo")
print("open", flush=True)
sys.stdin.read()
"""


def unread(path: Path) -> tuple[int, ...]:
    """What changes of a file when it is written, though not when it is read."""
    stat = path.stat()
    return stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def test_two_processes_cannot_run_in_one_folder(make_config, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "open\n"
    (out / ".saving-checkpoint-2-0123456789abcdef").mkdir()
    before = {path: unread(path) for path in out.iterdir()}
    for changes in ({}, {"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}):
        with pytest.raises(UserError, match=r"is in use by another run.*: wait until") as error:
            open_run(make_config(**changes), "ppo")
        one_line(error)
    assert {path: unread(path) for path in out.iterdir()} == before
    process.communicate()
    assert open_run(make_config(resume_from_checkpoint="auto"), "ppo").output_dir == out


def test_a_process_may_open_its_run_again(make_config):
    for changes in ({}, {"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}):
        open_run(make_config(**changes), "ppo")
    assert len(files._locks) == len(set(files._locks.values()))


def test_a_folder_that_cannot_be_locked_is_used_without(make_config, monkeypatch):
    def fail(*_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(files.fcntl, "flock", fail)
    open_run(make_config(), "ppo")


HOLDER = """
import os, sys, time
from pathlib import Path
from rlhf.run.files import lock_folder

lock_folder(Path(sys.argv[1]))
helper = os.fork() if len(sys.argv) > 2 else None
if helper == 0:
    time.sleep(60)
print(helper or os.getpid(), flush=True)
if helper is None:
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that locks the folder; gives what it prints."""
    processes, pids = [], []

    def start(*arguments: str, folder: Path = tmp_path) -> int:
        command = [sys.executable, "-c", HOLDER, str(folder), *arguments]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        pids.append(int(processes[-1].stdout.readline()))
        if arguments:
            processes[-1].wait()
        return pids[-1]

    yield start
    for pid in pids:
        os.kill(pid, 9)
    for process in processes:
        process.wait()


def test_who_holds_the_lock_is_named(hold, tmp_path):
    pid = hold()
    with pytest.raises(UserError) as error:
        lock_folder(tmp_path)
    named = f" (pid {pid})" if os.path.exists("/proc/locks") else ""
    assert f"{tmp_path} is in use by another run{named}: wait until" in str(error.value)


def test_a_forked_helper_does_not_keep_the_lock(hold, tmp_path):
    """The run has ended, and the helper of a reward function's lives on."""
    helper = hold("and fork")
    os.kill(helper, 0)
    lock_folder(tmp_path)


def test_a_demo_with_a_stage_that_goes_on_is_kept(hold, tmp_path):
    demo.begin(tmp_path, {"seed": 0}, [], False)
    (tmp_path / "ppo").mkdir()
    shutil.copyfile(tmp_path / MARKER, tmp_path / "ppo" / MARKER)
    hold(folder=tmp_path / "ppo")
    with pytest.raises(UserError, match="ppo is in use by another run"):
        demo.begin(tmp_path, {"seed": 0}, [], True)
    assert (tmp_path / "ppo" / MARKER).exists()
