"""What scripts ask of `trainer.accelerator`, answered for one process on one device."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

STATE = SimpleNamespace(deepspeed_plugin=None)


class Accelerator(NamedTuple):
    """The part of accelerate's class that is about devices and processes."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0
    local_process_index: int = 0
    is_main_process: bool = True
    is_local_main_process: bool = True
    state: SimpleNamespace = STATE

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def wait_for_everyone(self) -> None:
        """There is no one to wait for."""

    def print(self, *args, **kwargs) -> None:
        print(*args, **kwargs)
