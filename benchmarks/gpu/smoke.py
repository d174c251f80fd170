"""All ops on both backends: what is right, then what is fast.

    python3 -m benchmarks.gpu.smoke --out DIR [--families ppo_loss_,bits] [--rehearse]

The checks of both backends run side by side, so that Triton compiles meanwhile, the figures one
backend after the other. A family that hangs is left after WATCHDOG seconds, one that faults at
once; the next begins in a new process. `smoke.jsonl` grows by a line a check and a figure.
"""

import sys
import threading
import time

from benchmarks.gpu import common
from benchmarks.gpu.families import CHECKS, FIGURES

WATCHDOG = {False: 25.0, True: 250.0}  # seconds a family, on a GPU and in a rehearsal
# Less is not worth a process: it imports PyTorch and starts CUDA.
LEAST_SECONDS = 8.0


class Part:
    """Checks or figures of the families on one backend."""

    def __init__(self, what: str, backend: str, args, end: float):
        self.what, self.backend, self.args, self.end = what, backend, args, end
        self.lines = common.Lines(args.out / "smoke.jsonl")

    def run(self) -> None:
        known = CHECKS if self.what == "checks" else FIGURES
        todo = [name for name in self.args.families.split(",") if name in known]
        while todo and (left := self.end - time.monotonic()) > LEAST_SECONDS:
            code = common.run(
                *("-m", "benchmarks.gpu.part", self.what, self.backend, ",".join(todo)),
                *("--out", str(self.args.out), "--watchdog", str(WATCHDOG[self.args.rehearse])),
                *["--rehearse"] * self.args.rehearse,
                seconds=left,
            )
            done = {x.get("done") for x in self.lines.read() if x.get("part") == self.part}
            todo = [name for name in todo if name not in done]
            if code != 0 and todo:
                self.lines.add(failed=todo.pop(0), part=self.part, exit_code=code)
        for name in todo:
            self.lines.add(failed=name, part=self.part, exit_code="no time was left")

    @property
    def part(self) -> list[str]:
        return [self.what, self.backend]


def report(found: list[dict]) -> int:
    """Print a line for what is wrong and for each figure; return how many are wrong."""
    checks = [x for x in found if "check" in x]
    wrong = [x for x in checks if not x["right"]] + [x for x in found if "failed" in x]
    for x in found:
        if "copies" in x:
            print(
                f"{x['op']:28} {x['backend']:7} {x['shape']!s:16} {x['dtype']:9} "
                f"{x['copies']:7.3f} copies {x['device_us']:10.1f} µs, call {x['call_us']:.1f} µs, "
                f"copy {x['copy_gb_per_s']:6.0f} GB/s"
                + "".join(f"  × {k[6:]} {v:.1f}" for k, v in x.items() if k.startswith("times_"))
            )
    for x in wrong:
        print("WRONG", x)
    print(f"{sum(x['right'] for x in checks)} of {len(checks)} checks right")
    return len(wrong)


def main() -> int:
    parser = common.parser(__doc__.splitlines()[0], seconds=150)
    parser.add_argument("--families", default=",".join(dict.fromkeys([*CHECKS, *FIGURES])))
    parser.add_argument("--backends", default=",".join(common.BACKENDS))
    args = common.parse(parser)
    end = time.monotonic() + args.seconds
    lines = common.Lines(args.out / "smoke.jsonl")
    lines.path.unlink(missing_ok=True)
    backends = args.backends.split(",")
    checking = [
        threading.Thread(target=Part("checks", backend, args, end).run) for backend in backends
    ]
    for thread in checking:
        thread.start()
    for thread in checking:
        thread.join()
    for backend in backends:
        Part("figures", backend, args, end).run()
    return int(report(lines.read()) > 0)


if __name__ == "__main__":
    sys.exit(main())
