"""The CUDA backend on the CPU: `csrc/cuda/*.cu` compiled by the host compiler, every CUDA thread a
fiber, in an order that a seed chooses. It shows what a kernel computes, and that it does so in any
order: where a barrier is missing, some seeds give a wrong result or an error.

What it cannot show: threads switch where they wait, read a flag, add atomically or publish, not at
every access; memory is never reordered, so a plain load where `load_acquire` is due goes unseen
(tests/test_cuda_order.py reads the order from compiled code); nor is global memory out of bounds,
or the numbers in __launch_bounds__. `tests.emulator.mutations` leaves out what synchronises, place
by place, and tells which test finds it.
"""

import ctypes
import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from ppo_kernels import linear_chunks, schemas
from tests import ROOT, build_folder, setup_py

HERE = Path(__file__).parent

# Kernels read memory as other types than it was written as.
FLAGS = (
    "-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing "
    f"-U_FORTIFY_SOURCE -Wno-attributes -DTORCH_TARGET_VERSION={setup_py().TORCH_TARGET_VERSION}"
)
# A misaligned access calls a function of ours, see runtime.cpp.
CUDA_FLAGS = f"-x c++ -include {HERE}/emulator.h -fsanitize=alignment"

RULES = """\
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  description = compile $in
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -Wl,-Bsymbolic $in -L{torch} -ltorch_cpu -lc10 -Wl,-rpath,{torch} -o $out
  description = link $out
"""


class Unavailable(RuntimeError):
    """Nothing can be compiled here."""


def _ninja():
    """The command: its module is there too where the environment is not activated."""
    if shutil.which("ninja") is not None:
        return ["ninja"]
    if importlib.util.find_spec("ninja") is None:
        raise Unavailable("ninja is not installed")
    return [sys.executable, "-m", "ninja"]


def build(sources=None, name="kernels"):
    """Compile CUDA C++ files, those of the package unless told, and return the library's path."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if sources is None else sources
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise Unavailable(f"there is no C++ compiler ({compiler})")
    ninja = _ninja()
    folder = build_folder("emulated") / name
    folder.mkdir(parents=True, exist_ok=True)
    site = Path(torch.__file__).parent
    include = f"-I{HERE} -I{site / 'include'} -I{sysconfig.get_paths()['include']}"
    lines = [f"cxx = {compiler}", f"flags = {FLAGS} {include}", RULES.format(torch=site / "lib")]
    objects = []
    for source in [*sorted(HERE.glob("*.cpp")), *sources]:
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
        if source.suffix == ".cu":
            lines.append(f"  flags = {FLAGS} {CUDA_FLAGS} {include}")
    lines.append(f"build {name}.so: link {' '.join(objects)}\n")
    # Several test runs may share the folder. Ninja keeps the lock if this one is killed.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines))
        result = subprocess.run(
            [*ninja, "-C", str(folder), "-j2"],
            capture_output=True,
            text=True,
            pass_fds=(lock.fileno(),),
        )
    if result.returncode != 0:
        log = result.stdout + result.stderr
        raise RuntimeError(f"the emulated kernels do not compile:\n{log}")
    return folder / f"{name}.so"


class Emulator:
    """What a library with the emulator in it can be asked and told."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_seed.argtypes = [ctypes.c_uint64]
        counts = (
            *("switches", "questions", "launches", "last_blocks", "last_cluster"),
            *("largest_cluster", "bulk_copies", "bulk_begin", "bulk_end", "left_out"),
        )
        for name in counts:
            getattr(self.library, f"emulator_{name}").restype = ctypes.c_uint64

    def device(
        self,
        major=9,
        shared_per_block=232448,
        shared_per_sm=233472,
        ptx=None,
        cluster=8,
        multiprocessors=132,
    ):
        """From now on the device is one of this compute capability, shared memory (bytes) and
        number of multiprocessors, and the code that it runs for sm_`ptx`, unless told of 90 from
        capability 9 on, else of 80. There is room for clusters of so many blocks. To the kernels
        each is a device of its own."""
        ptx = (90 if major >= 9 else 80) if ptx is None else ptx
        self.library.emulator_device(
            major, shared_per_block, shared_per_sm, ptx, cluster, multiprocessors
        )

    def seed(self, seed):
        """The same seed gives the same order of threads in all launches that follow."""
        self.library.emulator_seed(seed)

    def leave_out(self, place):
        """What synchronises at "file.cu:line" does nothing from now on; at None, all does."""
        file, line = place.split(":") if place else ("", 0)
        self.library.emulator_leave_out(f"/{file}".encode(), int(line))

    def left_out(self):
        """How often something did nothing since `leave_out` was called."""
        return self.library.emulator_left_out()

    def switches(self):
        """How often a thread has been resumed."""
        return self.library.emulator_switches()

    def questions(self):
        """What the driver was asked about devices and kernels so far, or told of kernels."""
        return self.library.emulator_questions()

    def launches(self):
        return self.library.emulator_launches()

    def last_blocks(self):
        """Of the last launch."""
        return self.library.emulator_last_blocks()

    def last_cluster(self):
        """Blocks in a cluster of the last launch."""
        return self.library.emulator_last_cluster()

    def largest_cluster(self):
        """Blocks in a cluster of any launch since `device` was called."""
        return self.library.emulator_largest_cluster()

    def bulk_copies(self):
        """Since `device` was called."""
        return self.library.emulator_bulk_copies()

    def bulk_range(self):
        """The first address that these read, and that behind the last."""
        return self.library.emulator_bulk_begin(), self.library.emulator_bulk_end()


@functools.cache
def _loaded():
    """The emulator, or the error, which is the same each time: nothing is built twice."""
    try:
        path = build()
        schemas.NAMESPACE["emulated"] = "ppo_kernels_emulated"
        schemas.define("emulated")
        torch.ops.load_library(path)
        linear_chunks.register("emulated")
    except (RuntimeError, OSError) as error:
        return error
    return Emulator(path)


def load():
    """Build the package's kernels and register them for CPU tensors as `ppo_kernels_emulated`.

    Raises `Unavailable`, with the reason, where nothing can be compiled.
    """
    loaded = _loaded()
    if isinstance(loaded, Exception):
        raise loaded.with_traceback(None)
    return loaded
