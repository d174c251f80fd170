"""`rlhf env`: what a bug report needs to say of the machine."""

import importlib.metadata
import os
import platform
import runpy
from argparse import ArgumentParser, Namespace

import torch

from rlhf.run.terminal import say

PACKAGES = (
    *("transformers", "tokenizers", "safetensors", "huggingface_hub", "datasets", "pyarrow"),
    *("numpy", "tensorboard", "rich", "matplotlib", "jinja2", "pyyaml"),
    *("triton", "gymnasium", "trl", "torchrl"),
)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def add_arguments(parser: ArgumentParser) -> None:
    """It has none."""


def main(args: Namespace) -> int:
    runpy.run_module("ppo_kernels", run_name="__main__")
    say(f"system      {platform.platform()}, {os.cpu_count()} CPUs")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        say(f"GPU {number}       {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        say("GPU         PyTorch finds none")
    for package in PACKAGES:
        say(f"{package:<15} {version(package)}")
    return 0
