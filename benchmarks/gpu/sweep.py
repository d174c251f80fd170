"""Variants of one .cu file, timed in turns in one process on one warm GPU.

    python3 -m benchmarks.gpu.sweep build --folder DIR   where there is an nvcc
    python3 -m benchmarks.gpu.sweep time --folder DIR --out DIR [--tokens 8192 --vocabulary 151936]

A variant is a list of (file in csrc, old text, new text); one that no longer fits the sources is an
error. `sweep.json` has median, least and most milliseconds and copies of each.
"""

import concurrent.futures
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import common
from benchmarks.harness import make_clock
from ppo_kernels import dispatch, schemas
from tests import setup_py
from tests.compiled import cuda

SOURCE, OP = "ppo_loss_with_gradient.cu", "ppo_loss_"
VARIANTS = {
    "base": [],
    "threads256": [("cuda/common.cuh", "kMostThreads = 512", "kMostThreads = 256")],
    "resident2": [
        ("cuda/logprobs.cuh", "{3, 2}", "{2, 1}"),
        ("cuda/sweeps.cuh", "Layout::aligned  ? 3", "Layout::aligned  ? 2"),
    ],
    "resident4": [
        ("cuda/logprobs.cuh", "{3, 2}", "{4, 3, 2}"),
        ("cuda/sweeps.cuh", "Layout::aligned  ? 3", "Layout::aligned  ? 4"),
        ("cuda/common.cuh", "kMostThreads = 512", "kMostThreads = 256"),
    ],
    "together4": [
        ("cuda/sweeps.cuh", "constexpr int kTogether = 2", "constexpr int kTogether = 4")
    ],
    "copies8": [("cuda/logprobs.cuh", "kMostCopies = 16", "kMostCopies = 8")],
}
ROUNDS = 15


def varied(sources: Path, name: str) -> None:
    """Change a copy of csrc into a variant. Raises ValueError where a text is not there once."""
    for file, old, new in VARIANTS[name]:
        path = sources / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"variant {name}: {old!r} is {text.count(old)} times in {file}")
        path.write_text(text.replace(old, new))


def build(folder: Path, name: str, home: Path) -> str:
    """Build the shared object of a variant, whose op is in a namespace of its own."""
    from torch.utils import cpp_extension

    setup = setup_py()
    with tempfile.TemporaryDirectory() as copied:
        sources = Path(copied) / "csrc"
        shutil.copytree(common.ROOT / "csrc", sources)
        varied(sources, name)
        command = [
            f"{home}/bin/nvcc",
            *(flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)),
            f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET_VERSION}",
            f"-Dppo_kernels_native={namespace(name)}",
            *cpp_extension.COMMON_NVCC_FLAGS,
            *("-Xcompiler", "-fPIC", *setup.NVCC_FLAGS.split(), "-lineinfo", "-Xptxas", "-v"),
            *("-gencode=arch=compute_90a,code=sm_90a", "-shared"),
            *("-o", str(folder / f"{name}.so")),
            *(str(sources / "cuda" / file) for file in (SOURCE, "device.cu")),
            *(flag for path in cpp_extension.library_paths() for flag in ("-L", path)),
            *("-lc10", "-ltorch_cpu", "-Xlinker", "--no-as-needed", "-ltorch"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
    (folder / f"{name}.log").write_text(result.stdout + result.stderr)
    return f"{name}: " + ("built" if result.returncode == 0 else f"failed, see {name}.log")


def namespace(name: str) -> str:
    return f"ppo_kernels_{name}"


def loaded(folder: Path) -> dict:
    """Name -> op of each variant that was built."""
    ops = {}
    for path in sorted(folder.glob("*.so")):
        library = torch.library.Library(namespace(path.stem), "DEF")
        library.define(OP + schemas.SCHEMAS[OP][0])
        LIBRARIES.append(library)
        torch.ops.load_library(str(path))
        ops[path.stem] = getattr(getattr(torch.ops, namespace(path.stem)), OP)
    return ops


LIBRARIES = []


def measure(ops: dict, args) -> dict:
    setting = common.setting("native", rehearse=False)
    clock = make_clock(setting)
    torch.set_default_device(setting.device)
    shape = args.tokens, args.vocabulary
    logits = torch.randn(shape, dtype=torch.bfloat16)
    work, target = logits.clone(), torch.empty_like(logits)
    tokens, advantages = torch.randint(shape[1], shape[:1]), torch.randn(shape[0])
    old = torch.full((shape[0],), -12.0)
    numbers = dispatch.scalars(1.0, 0.2, 0.2, None, 0.01, 0.0)
    calls = {
        name: lambda op=op: op(work, tokens, old, advantages, None, None, None, None, numbers, 2)
        for name, op in ops.items()
    }
    calls["copy"] = lambda: target.copy_(logits)
    took = {name: [] for name in calls}
    for i in range(ROUNDS + 1):
        for name, call in calls.items():
            work.copy_(logits)
            seconds = clock(call).seconds
            if i:  # the first loads the code
                took[name].append(seconds * 1e3)
    copy = statistics.median(took["copy"])
    return {
        name: {
            "ms": statistics.median(x),
            "copies": statistics.median(x) / copy,
            "least": min(x),
            "most": max(x),
        }
        for name, x in took.items()
    }


def main() -> int:
    parser = common.parser(__doc__.splitlines()[0], seconds=60)
    parser.add_argument("what", choices=("build", "time"))
    parser.add_argument("--folder", type=Path, required=True, help="of the shared objects")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    if "build" in sys.argv[1:2]:
        args = parser.parse_args()
        home = cuda.cuda_home()
        if home is None:
            parser.error("there is no nvcc")
        args.folder.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            names = args.variants.split(",")
            results = list(pool.map(lambda name: build(args.folder, name, home), names))
        print(*results, sep="\n")
        return int(any("failed" in x for x in results))
    args = common.parse(parser)
    ops = loaded(args.folder)
    print("loaded", *ops)
    if args.rehearse:
        return 0
    found = measure(ops, args)
    described = {"tokens": args.tokens, "vocabulary": args.vocabulary}
    described |= {"device": torch.cuda.get_device_name(), "variants": found}
    (args.out / "sweep.json").write_text(json.dumps(described, indent=1))
    for name, x in sorted(found.items(), key=lambda item: item[1]["ms"]):
        spread = f"[{x['least']:.4f}, {x['most']:.4f}]"
        print(f"{name:12} {x['ms']:9.4f} ms {x['copies']:7.4f} copies {spread}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
