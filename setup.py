"""Builds the C++ extension; everything else stands in pyproject.toml.

Where it cannot be built the package installs all the same and runs on the `reference` backend.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# The oldest libtorch whose stable ABI the extension uses: one binary serves it and later ones.
TORCH_TARGET = (2, 10)

SOURCES = ["csrc/module.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]

# Contraction is written out where it is wanted: sums are then the same everywhere. GCC warns of
# the undefined values in its own AVX-512 header.
FLAGS = (
    "-std=c++20 -O3 -g0 -ffp-contract=off -fvisibility=hidden -Wall -Wno-uninitialized "
    "-Wno-maybe-uninitialized"
)


def why_not():
    """What is missing to build the extension; None when nothing is."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        return f"there are no Python headers in {include} (Debian: apt install python3-dev)"
    return None


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
        extra_compile_args=FLAGS.split(),
    )
    return {"ext_modules": [native], "cmdclass": {"build_ext": BuildExtension}}


reason = why_not()
if reason is not None:
    print(
        f"ppo_kernels: installed without the native backend, because {reason}; "
        "ops run on plain PyTorch, many times slower on the CPU",
        file=sys.stderr,
    )
setup(**(extension() if reason is None else {}))
