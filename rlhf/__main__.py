"""The process of a command: `python -m rlhf`, and the script `rlhf`."""

import os
import sys

from rlhf.errors import of_the_extra
from rlhf.run import signals
from rlhf.run.processes import world_size


def main() -> int:
    """Runs the command that the process was started with; returns its exit code."""
    signals.interrupt_at_once(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # whatever a terminal's encoding lacks is printed as an escape
            stream.reconfigure(errors="backslashreplace")

    try:
        from rlhf import cli

        code = cli.main()
    except ModuleNotFoundError as error:
        if (missing := of_the_extra(error)) is error:
            raise
        print(f"rlhf: error: {missing}", file=sys.stderr)
        code = 2
    if world_size() > 1:
        # Threads of gloo that live on while the interpreter goes down can abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
