"""The real packages: `pip install --no-build-isolation -e ".[peers]"`, then `pytest tests/peers`.

verl and OpenRLHF pin other versions of what TRL and torchrl need, so that no extra can hold them;
their functions run all the same: `pip install --no-deps verl==0.9.1 openrlhf==0.11.2` and
`pip install ray hydra-core codetiming peft tensordict orjson`.
"""

import importlib.util
import os
import sys
import types
import warnings

import pytest
import torch

# TRL says at each import that PPO is experimental.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture
def peer(request, monkeypatch):
    """The module that the test names in its parameter, or a skip that says what is missing."""
    path = request.param
    package = path.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "openrlhf":
        _openrlhf_without_gpu(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(path)


def _openrlhf_without_gpu(monkeypatch):
    """`openrlhf.models.utils` alone: beside it are models that want DeepSpeed and flash-attn."""
    spec = importlib.util.find_spec("openrlhf")
    models = types.ModuleType("openrlhf.models")
    models.__path__ = [f"{spec.submodule_search_locations[0]}/models"]
    monkeypatch.setitem(sys.modules, "openrlhf.models", models)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setattr(torch, "compile", lambda function: function)
