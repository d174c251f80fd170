"""The tests that need a GPU, of one backend or of both.

    python3 -m benchmarks.gpu.tests --backend native --out DIR

`tests-<backend>.xml` has the outcome of each. In a rehearsal they are collected and skipped.
"""

import importlib.util
import sys

from benchmarks.gpu import common

# By the ids of `tests.conftest`; what belongs to no backend runs with the first.
CHOSEN = {"native": ["-k", "not triton"], "triton": ["-k", "triton"], "both": []}


def command(backend: str) -> list[str]:
    """The arguments of Python that run them; the trainer's other tests need packages that such a
    machine may lack."""
    workers = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    watchdog = ["--timeout", "60"] if importlib.util.find_spec("pytest_timeout") else []
    paths = [str(path) for path in sorted((common.ROOT / "tests").glob("test_*.py"))]
    paths.append("tests/rlhf/test_on_gpu.py")
    return ["-m", "pytest", *paths, "-q", "-m", "gpu", *CHOSEN[backend], *workers, *watchdog]


def main() -> int:
    parser = common.parser(__doc__.splitlines()[0], seconds=240)
    parser.add_argument("--backend", choices=CHOSEN, default="both")
    args = common.parse(parser)
    return common.run(
        *command(args.backend),
        *["--collect-only"] * args.rehearse,
        f"--junit-xml={args.out.resolve()}/tests-{args.backend}.xml",
        seconds=args.seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
