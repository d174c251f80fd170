"""The process of a command: `python -m rlhf`, and the script `rlhf`."""

import os
import sys

import rlhf


def main() -> int:
    """Runs the command that the process was started with; returns its exit code."""
    if rlhf.MISSING:
        print(f"rlhf: error: {rlhf.HOW_TO_INSTALL}", file=sys.stderr)
        return 2

    from rlhf import signals
    from rlhf.processes import world_size

    signals.interrupt_at_once(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # whatever a terminal's encoding lacks is printed as an escape
            stream.reconfigure(errors="backslashreplace")

    from rlhf import cli

    code = cli.main()
    if world_size() > 1:
        # Threads of gloo that live on while the interpreter goes down can abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
