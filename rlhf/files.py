"""Files that are whole or not there and surely on the disk, and errors of the disk in one line."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None

_locks: dict[Path, int] = {}  # open descriptors of the folders that this process has locked

GO_ON = "free some space or mend the folder, then go on with --resume_from_checkpoint auto"


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, complete or not at all."""
    temporary = path.with_name(f".saving-{path.name}")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Has a file's content, or a folder's list of names, on the disk before it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> None:
    """Keeps the runs of other processes out of an output folder until this process ends; raises
    UserError if another one does so. The same process may lock it again."""
    if fcntl is None:
        return
    folder = folder.resolve()
    if folder in _locks:
        os.close(_locks.pop(folder))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _lock_holder(descriptor)
        os.close(descriptor)
        raise UserError(
            f"output_dir {folder} is in use by another run{holder}: wait until its process ends, "
            "or choose another folder"
        ) from error
    except OSError:  # a file system that cannot lock folders
        pass
    _locks[folder] = descriptor


def _lock_holder(descriptor: int) -> str:
    """' (pid N)' of the process that has locked an open folder, where Linux tells it."""
    status = os.fstat(descriptor)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    # 1: FLOCK  ADVISORY  WRITE 7871 fe:00:2172347 0 EOF
    for _, kind, _, _, pid, where, *_ in map(str.split, locks):
        if (kind, where) == ("FLOCK", place):
            return f" (pid {pid})"
    return ""


def _release_locks() -> None:
    """A process that is forked, as by a reward function, would keep the folders locked after the
    run's own end."""
    for descriptor in _locks.values():
        os.close(descriptor)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_locks)


@contextmanager
def disk_errors(action: str, remedy: str) -> Iterator[None]:
    """Turns errors of the disk within the block into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise UserError(f"cannot {action}: {reason}: {remedy}") from error


def disk_error(error: BaseException | None) -> str | None:
    """The operating system's reason why a file could not be written; None for other errors.

    safetensors and tokenizers, written in Rust, have it in their text, and torch in the OSError
    that its own error came after.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if found := re.search(r"([^:]+) \(os error \d+\)", str(error)):
            return found[1].strip()
        error = error.__cause__ or error.__context__
    return None
