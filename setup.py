"""Builds the C++ extension; everything else stands in pyproject.toml.

Without a C++ compiler the package installs all the same and runs on the `reference` backend.
"""

import os
import shutil
import sys

from setuptools import setup

# The oldest libtorch whose stable ABI the extension uses: one binary serves it and later ones.
TORCH_TARGET = (2, 10)

SOURCES = [
    "csrc/module.cpp",
    "csrc/cpu/gae.cpp",
    "csrc/cpu/kl.cpp",
    "csrc/cpu/logprobs.cpp",
    "csrc/cpu/masked.cpp",
    "csrc/cpu/ppo_loss.cpp",
    "csrc/cpu/sweeps.cpp",
    "csrc/cpu/sweeps_avx2.cpp",
    "csrc/cpu/sweeps_avx512.cpp",
    "csrc/cpu/sweeps_avx512_bf16.cpp",
    "csrc/cpu/sweeps_baseline.cpp",
]


def extension():
    """Keyword arguments of setup() that build `ppo_kernels._C`; none when nothing can build it."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(
            f"ppo_kernels: no C++ compiler ({compiler}): installing without the native backend, "
            "ops run on plain PyTorch (several times slower on the CPU)",
            file=sys.stderr,
        )
        return {}
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    major, minor = TORCH_TARGET
    native = CppExtension(
        "ppo_kernels._C",
        SOURCES,
        include_dirs=[pybind11.get_include()],
        define_macros=[
            ("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000"),
            ("PPO_TORCH_TARGET", f'"{major}.{minor}"'),
        ],
        # Contraction is written out where it is wanted: sums are then the same everywhere.
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden",
            "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    )
    return {"ext_modules": [native], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
