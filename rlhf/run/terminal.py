"""Lines for people. They quote data, file names and models, none of which may speak to the terminal
itself, and come from one of the processes."""

import re
import sys

from rlhf.run.processes import is_main

# Control characters but tab and line break, what turns the direction of writing, line separators,
# and halves of surrogate pairs, which no encoding has.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
)
LONGEST_WORD, LONGEST_LINE = 250, 1500


def printable(text: object) -> str:
    """The text with escapes in place of what is no character to see."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(text: object) -> None:
    """Prints to stdout."""
    if is_main():
        print(printable(text), flush=True)


def complain(message: str, *, of_any_rank: bool = False) -> None:
    """Prints one line to stderr, of a length that can be read."""
    line = re.sub(
        rf"\S{{{LONGEST_WORD},}}",
        lambda found: _cut(found[0], LONGEST_WORD),
        printable(" ".join(message.splitlines())),
    )
    if is_main() or of_any_rank:
        print(_cut(line, LONGEST_LINE), file=sys.stderr, flush=True)


def _cut(text: str, length: int) -> str:
    """Without its middle if it is longer: what is wrong comes first, the remedy last."""
    rest = length // 4
    return text if len(text) <= length else f"{text[: length - rest - 5]} ... {text[-rest:]}"
