"""Signals: at once before the first step of a stage and after its last, afterwards at a safe point.

This module is imported before all others and must stay light.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

from rlhf.run.processes import is_main, world_size

# What a line says of each. SIGUSR1 is how Slurm tells that the time is running out.
WORDS = {
    getattr(signal, name): word
    for name, word in (
        ("SIGINT", "interrupted"),
        ("SIGTERM", "ended by SIGTERM"),
        ("SIGUSR1", "ended by SIGUSR1"),
    )
    if hasattr(signal, name)
}
# torchrun hands on to its processes what they may have got from the terminal themselves.
SAME_SIGNAL_SECONDS = 2.0

_command = "rlhf"
_previous = {}  # the handlers that `catch` replaced
_received: list[tuple[int, float]] = []  # the first signal since, and when it came


class Stopped(KeyboardInterrupt):
    """A signal has ended a run, which said so in a line and can go on; `code` is the exit code."""

    def __init__(self, number: int):
        super().__init__(WORDS[number])
        self.code = 128 + number


def end_at_once(number: int, frame: object = None) -> None:
    """Ends the process with one line: the handler of SIGINT wherever nothing is to be saved.

    It raises nothing: in the middle of an import an exception may become another one, and in the
    middle of C++ code it aborts.
    """
    with suppress(Exception):  # what is being written this very moment cannot be flushed
        sys.stdout.flush()
    with suppress(OSError):
        if is_main():
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # a display of progress hides the cursor
            os.write(2, f"{_command}: {WORDS[number]}\n".encode())
    os._exit(128 + number)


def interrupt_at_once(argv: list[str]) -> None:
    """Has SIGINT end the process at once, in the name of its command, unless it is ignored."""
    global _command
    _command = " ".join(["rlhf", *filter(str.isalpha, argv[:1])])
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end_at_once)


def catch() -> None:
    """From now on signals are noted for `received`; a second one ends the process at once.

    Those that are ignored stay so. Only the main thread can do this, elsewhere nothing is caught.
    """
    if threading.current_thread() is threading.main_thread() and not _previous:
        for number in WORDS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                _previous[number] = signal.signal(number, _note)


def release() -> None:
    """Undoes `catch`."""
    for number, handler in _previous.items():
        signal.signal(number, handler)
    _previous.clear()
    _received.clear()


def received() -> int:
    """The first signal since `catch`, 0 if there is none."""
    return _received[0][0] if _received else 0


def _note(number: int, frame: object) -> None:
    now = time.monotonic()
    if not _received:
        _received.append((number, now))
    elif world_size() == 1 or now - _received[0][1] > SAME_SIGNAL_SECONDS:
        end_at_once(number)


def _be_a_helper() -> None:
    """In a process that a reward function forks, signals do what they do anywhere."""
    for number in WORDS:
        if signal.getsignal(number) in (_note, end_at_once):
            is_int = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_int else signal.SIG_DFL)
    _previous.clear()
    _received.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_be_a_helper)
