"""Builds the C++ extension; everything else stands in pyproject.toml.

Where it cannot be built the package installs all the same and runs on the `reference` backend. CUDA
sources are part of it if torch has CUDA or the environment FORCE_CUDA=1; FORCE_CUDA=0 leaves them
out. TORCH_CUDA_ARCH_LIST names other GPUs than the default.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# The oldest libtorch whose stable ABI the extension uses: one binary serves it and later ones.
TORCH_TARGET = (2, 10)
TORCH_TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)

SOURCES = sorted(str(path) for path in Path("csrc").glob("**/*.cpp"))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))

# Contraction is written out where it is wanted: sums are then the same everywhere. GCC warns of
# the undefined values in its own AVX-512 header.
FLAGS = (
    "-std=c++20 -O3 -g0 -ffp-contract=off -fvisibility=hidden -Wall -Wno-uninitialized "
    "-Wno-maybe-uninitialized"
)
# Fused multiply-adds are written out here too: bits must not depend on what ptxas contracts.
NVCC_FLAGS = "-std=c++20 -O3 -fmad=false -Xcompiler -fvisibility=hidden"
# The GPUs whose code is compiled. Later ones compile what is added for them, the PTX of the last.
ARCHS = ("sm_80", "sm_90a", "sm_100a")
OLDEST = 80  # that the kernels compile for


def why_not():
    """What is missing to build the extension; None when nothing is."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        return f"there are no Python headers in {include} (Debian: apt install python3-dev)"
    return None


class Missing(Exception):
    """What the CUDA sources cannot be built without."""


def nvcc_says(cuda_home, *options):
    command = [Path(cuda_home, "bin", "nvcc"), *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(f"nvcc does not run: {error}") from error
    return result.stdout + result.stderr


def found(pattern, text):
    match = re.search(pattern, text)
    if match is None:
        raise Missing(f"nvcc is not understood: no {pattern!r} in {text!r}")
    return match[1]


def check_nvcc(cuda_home):
    import torch

    if cuda_home is None or not Path(cuda_home, "bin", "nvcc").exists():
        raise Missing("there is no nvcc (CUDA_HOME is to name the folder of the CUDA toolkit)")
    major = found(r"release (\d+)", nvcc_says(cuda_home, "--version"))
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != major:
        raise Missing(f"nvcc in {cuda_home} is of CUDA {major}, torch of {torch.version.cuda}")


def gencode(kind, number):
    return f"-gencode=arch=compute_{number},code={kind}_{number}"


def default_code(cuda_home):
    """Flags of nvcc that name the GPUs to compile for: ARCHS, where it knows them."""
    known = nvcc_says(cuda_home, "--list-gpu-code").split()
    numbers = [arch.removeprefix("sm_") for arch in ARCHS if arch.rstrip("a") in known]
    if not numbers:
        raise Missing(f"nvcc knows none of {', '.join(ARCHS)}")
    return [*(gencode("sm", x) for x in numbers), gencode("compute", numbers[-1].rstrip("a"))]


def listed_code(cuda_home):
    """The same for TORCH_CUDA_ARCH_LIST."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    listed = os.environ["TORCH_CUDA_ARCH_LIST"]
    try:
        flags = _get_cuda_arch_flags()
    except (ValueError, IndexError) as error:  # the latter for "native" without a GPU
        raise Missing(f"TORCH_CUDA_ARCH_LIST={listed} names no GPU: {error}") from error
    old = [x for x in flags if int(found(r"compute_(\d+)", x)) < OLDEST]
    if old:
        archs = ", ".join(x.rpartition("=")[2] for x in old)
        print(f"ppo_kernels: not compiled for {archs}, older than sm_{OLDEST}", file=sys.stderr)
    if len(old) == len(flags):
        raise Missing(f"TORCH_CUDA_ARCH_LIST={listed} has no GPU from sm_{OLDEST} on")
    known = nvcc_says(cuda_home, "--list-gpu-code").split()
    flags = [x for x in flags if x not in old]
    for x in flags:
        arch = "sm_" + found(r"compute_(\d+)", x)
        if arch not in known:
            raise Missing(f"nvcc in {cuda_home} does not know {arch}")
    return flags


def cuda_link_flags(cuda_home):
    """The static runtime looks for the driver when it is called, so the extension loads without.
    libtorch itself has no symbols, but leads to those of libtorch_cuda."""
    steps = nvcc_says(cuda_home, "--dryrun", "-c", "-x", "cu", "/dev/null")
    return [
        *shlex.split(found(r"LIBRARIES=(.*)", steps)),
        *("-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"),
        *("-Wl,--no-as-needed", "-ltorch"),
    ]


def cuda_forced():
    """What FORCE_CUDA says, None if nothing."""
    force = os.environ.get("FORCE_CUDA") or None
    if force not in (None, "0", "1"):
        sys.exit(f"ppo_kernels: FORCE_CUDA must be 0 or 1, got {force!r}")
    return None if force is None else force == "1"


def add_cuda(native):
    """Adds the CUDA sources to the extension, where they are wanted and can be built."""
    import torch
    from torch.utils import cpp_extension

    forced = cuda_forced()
    if forced is False or (forced is None and torch.version.cuda is None):
        return
    cuda_home = cpp_extension.CUDA_HOME or cpp_extension._find_cuda_home()
    try:
        check_nvcc(cuda_home)
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        code = listed_code(cuda_home) if listed else default_code(cuda_home)
        link_flags = cuda_link_flags(cuda_home)
    except Missing as reason:
        if forced:
            sys.exit(f"ppo_kernels: FORCE_CUDA=1 asks for the CUDA sources, but {reason}")
        print(
            f"ppo_kernels: installed without the CUDA C++ kernels, because {reason}; "
            "on GPUs the native backend is missing, ops run on Triton",
            file=sys.stderr,
        )
        return
    # A torch without CUDA has not looked for it, and its BuildExtension takes nvcc from here.
    cpp_extension.CUDA_HOME = cuda_home
    archs = " ".join(flag.rpartition("=")[2] for flag in code)
    native.extra_compile_args["cxx"].append(f'-DPPO_CUDA_ARCHS="{archs}"')
    # Such a torch does not have ninja watch the headers of .cu files either, but it does the flags.
    headers = sorted([*Path("csrc").glob("*.h"), *Path("csrc/cuda").glob("*.cuh")])
    content = hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()
    native.extra_compile_args["nvcc"] = [*NVCC_FLAGS.split(), *code, f"-DPPO_HEADERS=x{content}"]
    native.sources += CUDA_SOURCES
    native.extra_link_args += link_flags


def without_other_builds(build_ext):
    """`build_ext` that removes extensions of older versions, whose file names held a version of
    Python: it would import them in place of the one that is built."""

    class Command(build_ext):
        def run(self):
            super().run()
            folders = [f"{self.build_lib}/ppo_kernels"]
            if self.inplace or self.editable_mode:
                folders.append("ppo_kernels")
            for folder in folders:
                for stale in Path(folder).glob("_C.cpython-*.so"):
                    stale.unlink()

    return Command


def extension():
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(
            "ppo_kernels is built against the torch that is installed, and there is none: "
            "pip install torch, then pip install --no-build-isolation ."
        )
    native = CppExtension(
        "ppo_kernels._C",
        SOURCES,
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("PPO_TORCH_TARGET", '"{}.{}"'.format(*TORCH_TARGET)),
        ],
        extra_compile_args={"cxx": FLAGS.split()},
        py_limited_api=True,
    )
    add_cuda(native)
    return {
        "ext_modules": [native],
        "cmdclass": {"build_ext": without_other_builds(BuildExtension)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def main():
    reason = why_not()
    if reason is not None:
        if cuda_forced():
            sys.exit(f"ppo_kernels: FORCE_CUDA=1 asks for the CUDA sources, but {reason}")
        print(
            f"ppo_kernels: installed without the native backend, because {reason}; "
            "ops run on plain PyTorch, many times slower on the CPU",
            file=sys.stderr,
        )
    setup(**(extension() if reason is None else {}))


# So it is called in a build; tests import the flags.
if __name__ == "__main__":
    main()
