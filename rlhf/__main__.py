import os
import sys

from rlhf.cli import main

if __name__ == "__main__":
    code = main()
    from rlhf.distributed import world_size  # imports torch, which help need not wait for

    if world_size() > 1:
        # Threads of gloo that live on while the interpreter goes down can abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
