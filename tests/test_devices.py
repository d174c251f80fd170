"""Tensors that hold no values, devices without fp64, and a default device that is another one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppo_kernels import kept
from tests.calls import NAMES, calls


def _backend_of(call, backend):
    if not call.takes_backend and backend != "reference":
        pytest.skip("it has no backend")
    return backend


def _kinds(results):
    return [(x.shape, x.dtype) for x in tree_leaves(results)]


@pytest.mark.parametrize("name", NAMES)
def test_the_default_device_plays_no_part(backend, name):
    call = calls()[name]
    backend = _backend_of(call, backend)
    expected = call.results_and_gradients(backend)
    with torch.device("meta"):
        got = call.results_and_gradients(backend)
    assert all(x.equal(y) for x, y in zip(tree_leaves(expected), tree_leaves(got), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_tell_what_results_would_be(name):
    call = calls()[name]
    expected = call.results_and_gradients("reference")
    on_meta = call._replace(
        differentiable={k: x.to("meta") for k, x in call.differentiable.items()},
        constants={k: x.to("meta") for k, x in call.constants.items()},
    )
    for backend in ("auto", "reference"):
        got = on_meta.results_and_gradients(backend)
        assert all(x.is_meta for x in tree_leaves(got))
        assert _kinds(got) == _kinds(expected)


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_tell_what_results_would_be(backend, name):
    call = calls()[name]
    backend = _backend_of(call, backend)
    expected = call.results_and_gradients(backend)
    with FakeTensorMode() as mode:
        fake = call._replace(
            differentiable={k: mode.from_tensor(x) for k, x in call.differentiable.items()},
            constants={k: mode.from_tensor(x) for k, x in call.constants.items()},
        )
        got = fake.results_and_gradients(backend)
    assert _kinds(got) == _kinds(expected)


class _WithoutFP64(TorchDispatchMode):
    """As on Apple's GPUs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            assert getattr(x, "dtype", None) != torch.float64, f"{function} made an fp64 tensor"
        return results


@pytest.mark.parametrize("denominator", (5, 5.0, torch.tensor(5)), ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_makes_no_fp64_tensor(name, denominator, monkeypatch):
    """Told that the device has no segmented sums the kept log-probs take none."""
    call = calls()[name]
    if "denominator" in call.numbers:
        call = call._replace(numbers=call.numbers | {"denominator": denominator})
    elif denominator != 5:
        pytest.skip("no denominator")
    expected = call.results_and_gradients("reference")
    monkeypatch.setattr(kept, "_SEGMENTED", ())
    with _WithoutFP64():
        got = call.results_and_gradients("reference")
    for x, y in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        torch.testing.assert_close(x, y)
