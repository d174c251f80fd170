"""Arguments of the scripts, where results go, and processes that end in time."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import Setting

ROOT = Path(__file__).parents[2]
BACKENDS = ("native", "triton")


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out",
        type=Path,
        default=os.environ.get("OUT"),
        help="folder of the results ($OUT)",
    )
    parser.add_argument("--seconds", type=float, default=seconds, help="limit of the whole script")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, on tiny tensors")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; the folder of the results is made. Exits where there is no folder or GPU."""
    args = parser.parse_args()
    if args.out is None:
        parser.error("--out must name a folder: the environment variable OUT is not set")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU: --rehearse runs without one")
    args.out = Path(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    return args


def setting(backend: str, rehearse: bool) -> Setting:
    name, device = ("rehearsal", "cpu") if rehearse else ("cuda", "cuda")
    return Setting(name, torch.device(device), backend, peers=False)


class Lines:
    """A file with a JSON object a line, which several processes extend."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, **found) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")

    def read(self) -> list[dict]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def start(*arguments: str, under: tuple = (), output: Path | None = None) -> subprocess.Popen:
    """Starts `python ARGUMENTS` in the repository, `under` another program, if one is given."""
    print("$", *under, "python", *arguments, flush=True)
    command = [*under, sys.executable, *arguments]
    if output is None:
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    with open(output, "w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
        )


def finish(process: subprocess.Popen, seconds: float) -> int:
    """The exit code of a process, 124 if it had to be stopped."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
            process.wait()


def run(*arguments: str, seconds: float, under: tuple = ()) -> int:
    """`start` and `finish`."""
    return finish(start(*arguments, under=under), seconds)
