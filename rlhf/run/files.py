"""Files that are whole or not there and surely on the disk, and errors of the disk in one line.

What is being written or deleted stands beside its place under a name that nobody can foresee,
`.saving-NAME-<16 hex digits>` or `.deleting-…`; a kill may leave it there.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from rlhf.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None

_locks: dict[Path, int] = {}  # open descriptors of the folders that this process has locked

LEFTOVER = re.compile(r"\.(saving|deleting)-.+-[0-9a-f]{16}", re.DOTALL)
GO_ON = "free some space or mend the folder, then go on with --resume_from_checkpoint auto"


def saving_name(path: Path) -> Path:
    """A new name beside `path`, for what is renamed `path` once it is whole."""
    return path.with_name(f".saving-{path.name}-{secrets.token_hex(8)}")


def deleting_name(path: Path) -> Path:
    """A new name beside `path`, for what is to be deleted and never there in part."""
    return path.with_name(f".deleting-{path.name}-{secrets.token_hex(8)}")


def is_leftover(path: Path) -> bool:
    """Tells whether the name is one of those above."""
    return LEFTOVER.fullmatch(path.name) is not None


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, complete or not at all; a link that has its name is replaced.

    It may be written by several processes at once: it is then the file of one of them.
    """
    try:
        _write_and_rename(path, content)
    except FileNotFoundError:
        # A run that started in the folder took the temporary file for what a kill had left.
        _write_and_rename(path, content)
    sync(path.parent)


def _write_and_rename(path: Path, content: bytes) -> None:
    temporary = saving_name(path)
    try:
        create(temporary, content)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create(path: Path, content: bytes) -> None:
    """Writes a file that must not be there yet, nor a link of its name."""
    with path.open("xb") as file:
        file.write(content)


def open_to_append(path: Path) -> TextIO:
    """Opens a text file, which must be no link, to add to it."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8")


def open_to_read(path: Path) -> BinaryIO:
    """Opens a regular file. Raises OSError for pipes and devices, for which one might wait."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_file(path: Path) -> bytes:
    with open_to_read(path) as file:
        return file.read()


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
