"""The benchmarks, against eager PyTorch, `torch.compile` and peers.

    python3 -m benchmarks.gpu.bench --ops ppo_loss,kl --out DIR [--backend native] [--no-baselines]

`bench-<backend>.json` and a page beside it, `python -m benchmarks.report FILE`, hold what was
measured until the limit.
"""

import sys
import time

from benchmarks.gpu import common

OPS = ("ppo_loss", "logprobs", "kl", "gae", "sampling", "statistics", "linear")
# None starts in the last seconds; the page takes some.
LAST_SECONDS, REPORT_SECONDS = 20, 20


def main() -> int:
    parser = common.parser(__doc__.splitlines()[0], seconds=240)
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {', '.join(OPS)}")
    parser.add_argument("--backend", choices=(*common.BACKENDS, "auto"), default="auto")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--peers", help="folder from which trl and liger_kernel may be imported")
    args = common.parse(parser)
    end = time.monotonic() + args.seconds
    results = args.out.resolve() / f"bench-{args.backend}.json"
    left = args.seconds - LAST_SECONDS - REPORT_SECONDS
    code = common.run(
        *("-m", "pytest", *(f"benchmarks/bench_{op}.py" for op in args.ops.split(","))),
        *("-q", "--benchmark-quiet", "--results", str(results), "--seconds", f"{left:.0f}"),
        *(["--rehearse"] if args.rehearse else ["--device", "cuda"]),
        *([] if args.backend == "auto" else ["--backend", args.backend]),
        *["--no-baselines"] * args.no_baselines,
        *(["--peers", args.peers] if args.peers else []),
        seconds=left + LAST_SECONDS,
    )
    if not results.exists():
        return code or 1
    return code or common.run(
        "-m", "benchmarks.report", str(results), seconds=max(1.0, end - time.monotonic())
    )


if __name__ == "__main__":
    sys.exit(main())
