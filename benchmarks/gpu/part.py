"""The families of one part of `benchmarks.gpu.smoke`, in a process that a hanging kernel ends."""

import argparse
import faulthandler
import sys
from pathlib import Path

import torch

from benchmarks.gpu import common
from benchmarks.gpu.families import CHECKS, FIGURES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("checks", "figures"))
    parser.add_argument("backend", choices=common.BACKENDS)
    parser.add_argument("families")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--watchdog", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    lines = common.Lines(args.out / "smoke.jsonl")
    setting = common.setting(args.backend, args.rehearse)
    torch.set_default_device(setting.device)
    torch.manual_seed(0)
    if args.rehearse:
        from tests import interpreter

        interpreter.prepare()
    families = CHECKS if args.what == "checks" else FIGURES
    for name in args.families.split(","):
        # A kernel that hangs never returns: the process goes, with a traceback.
        faulthandler.dump_traceback_later(args.watchdog, exit=True)
        for found in families[name](setting):
            lines.add(backend=args.backend, **found)
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
        faulthandler.cancel_dump_traceback_later()
        lines.add(part=[args.what, args.backend], done=name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
