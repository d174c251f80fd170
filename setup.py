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

SOURCES = ["csrc/module.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))

# Contraction is written out where it is wanted: sums are then the same everywhere. GCC warns of
# the undefined values in its own AVX-512 header.
FLAGS = (
    "-std=c++20 -O3 -g0 -ffp-contract=off -fvisibility=hidden -Wall -Wno-uninitialized "
    "-Wno-maybe-uninitialized"
)
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler -fvisibility=hidden"
# The GPUs whose code is compiled. Later ones compile what is added for them, the PTX of the last.
ARCHS = ("sm_80", "sm_90a", "sm_100a")


def why_not():
    """What is missing to build the extension; None when nothing is."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        return f"there are no Python headers in {include} (Debian: apt install python3-dev)"
    return None


def nvcc_says(cuda_home, *options):
    command = [Path(cuda_home, "bin", "nvcc"), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def why_not_cuda(cuda_home):
    """What is missing to build the CUDA sources; None when nothing is."""
    import torch

    if cuda_home is None or not Path(cuda_home, "bin", "nvcc").exists():
        return "there is no nvcc (CUDA_HOME is to name the folder of the CUDA toolkit)"
    major = re.search(r"release (\d+)", nvcc_says(cuda_home, "--version"))[1]
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != major:
        return f"nvcc in {cuda_home} is of CUDA {major}, torch of {torch.version.cuda}"
    return None


def cuda_code(cuda_home):
    """Flags of nvcc that name the GPUs to compile for."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return _get_cuda_arch_flags()
    known = nvcc_says(cuda_home, "--list-gpu-code").split()
    archs = [arch for arch in ARCHS if arch.rstrip("a") in known]
    archs.append(archs[-1].rstrip("a").replace("sm", "compute"))
    return [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in archs]


def cuda_link_flags(cuda_home):
    """The static runtime looks for the driver when it is called, so the extension loads without.
    libtorch itself has no symbols, but leads to those of libtorch_cuda."""
    steps = nvcc_says(cuda_home, "--dryrun", "-c", "-x", "cu", "/dev/null")
    return [
        *shlex.split(re.search(r"LIBRARIES=(.*)", steps)[1]),
        *("-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"),
        *("-Wl,--no-as-needed", "-ltorch"),
    ]


def add_cuda(native):
    """Adds the CUDA sources to the extension, where they are wanted and can be built."""
    import torch
    from torch.utils import cpp_extension

    wanted = os.environ.get("FORCE_CUDA") or ("0" if torch.version.cuda is None else "1")
    if wanted != "1":
        return
    cuda_home = cpp_extension.CUDA_HOME or cpp_extension._find_cuda_home()
    reason = why_not_cuda(cuda_home)
    if reason is not None:
        if os.environ.get("FORCE_CUDA"):
            sys.exit(f"ppo_kernels: FORCE_CUDA=1 asks for the CUDA sources, but {reason}")
        print(
            f"ppo_kernels: installed without the CUDA C++ kernels, because {reason}; "
            "on GPUs the native backend is missing, ops run on Triton",
            file=sys.stderr,
        )
        return
    # A torch without CUDA has not looked for it, and its BuildExtension takes nvcc from here.
    cpp_extension.CUDA_HOME = cuda_home
    code = cuda_code(cuda_home)
    archs = " ".join(flag.rpartition("=")[2] for flag in code)
    native.extra_compile_args["cxx"].append(f'-DPPO_CUDA_ARCHS="{archs}"')
    # Such a torch does not have ninja watch the headers of .cu files either, but it does the flags.
    headers = sorted([*Path("csrc").glob("*.h"), *Path("csrc/cuda").glob("*.cuh")])
    content = hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()
    native.extra_compile_args["nvcc"] = [*NVCC_FLAGS.split(), *code, f"-DPPO_HEADERS=x{content}"]
    native.sources += CUDA_SOURCES
    native.extra_link_args += cuda_link_flags(cuda_home)


def extension():
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(
            "ppo_kernels is built against the torch that is installed, and there is none: "
            "pip install torch, then pip install --no-build-isolation ."
        )
    major, minor = TORCH_TARGET
    native = CppExtension(
        "ppo_kernels._C",
        SOURCES,
        define_macros=[
            ("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000"),
            ("PPO_TORCH_TARGET", f'"{major}.{minor}"'),
        ],
        extra_compile_args={"cxx": FLAGS.split()},
    )
    add_cuda(native)
    return {"ext_modules": [native], "cmdclass": {"build_ext": BuildExtension}}


def main():
    reason = why_not()
    if reason is not None:
        print(
            f"ppo_kernels: installed without the native backend, because {reason}; "
            "ops run on plain PyTorch, many times slower on the CPU",
            file=sys.stderr,
        )
    setup(**(extension() if reason is None else {}))


# So it is called in a build; tests import the flags.
if __name__ == "__main__":
    main()
