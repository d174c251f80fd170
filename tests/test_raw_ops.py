"""Registered ops called by hand: wrong shapes, dtypes and devices raise, and nothing outside of a
tensor is read or written."""

import pytest
import torch

from ppo_kernels import dispatch, linear_chunks, schemas
from tests.conftest import EMULATED, needs_native
from tests.test_registered_ops import _samples

OPS = [name for name in schemas.SCHEMAS if name not in linear_chunks.OPS]


@pytest.fixture(params=(pytest.param("native", marks=needs_native), EMULATED, "triton"))
def launchers(request):
    """The backend whose launchers are called: C++, of the CPU and of GPUs, or Triton."""
    if request.param == EMULATED:
        request.getfixturevalue("emulated")
        return "native"
    reason = dispatch.why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(reason)
    return request.param


def _wrong(name, x):
    """What an argument must not be instead of the tensor `x`."""
    if name == "scalars":
        yield x[:-1]
        yield x.float()
        return
    yield x.to(torch.complex64)
    if x.dtype.is_floating_point and name not in ("scale", "grad"):
        yield x.to(torch.int32)
    if x.dtype == torch.bool or not x.dtype.is_floating_point:
        yield x.float()
    if x.dtype == torch.int64:
        yield x.to(torch.int16)
    if name == "denominator":
        yield x.float()
    if name in ("denominator", "scale"):
        yield x.new_ones(2)
    elif name in ("logits", "values", "rewards", "logprobs", "x", "grad"):
        # Others are like it: it is wrong where they are.
        return
    elif name == "cu_seqlens":
        yield x[:0]
        yield x[None]
    else:
        yield x.new_zeros((*x.shape, 2))
        yield x.new_zeros(0)
        yield x.new_zeros(1)


def _calls(name, backend):
    """(argument, call with a wrong one) for each wrong value of each tensor of each sample."""
    op = getattr(dispatch.kernels(backend), name)
    names = [x.name for x in op.default._schema.arguments]
    for arguments in _samples(backend)[name]:
        for i, x in enumerate(arguments):
            if isinstance(x, torch.Tensor):
                for wrong in _wrong(names[i], x):
                    yield names[i], op, (*arguments[:i], wrong, *arguments[i + 1 :])


@pytest.mark.parametrize("name", OPS)
def test_wrong_tensors_raise(launchers, name):
    tried = 0
    for argument, op, arguments in _calls(name, launchers):
        with pytest.raises(ValueError, match=rf"^{argument} must"):
            op(*arguments)
        tried += 1
    assert tried > 2


@pytest.mark.parametrize("name", ("token_logprobs", "token_statistics", "sample_tokens"))
def test_logits_without_a_vocabulary_raise(launchers, name):
    op = getattr(dispatch.kernels(launchers), name)
    for logits in (torch.ones(()), torch.ones(2, 0)):
        arguments = list(_samples(launchers)[name][0])
        arguments[0] = logits
        with pytest.raises(ValueError, match=r"logits must have shape \(\.\.\., V\) with V >= 1"):
            op(*arguments)


def test_rewards_of_gae_are_rows(launchers):
    with pytest.raises(ValueError, match=r"rewards must have two dimensions, got \(3,\)"):
        x = torch.ones(3)
        dispatch.kernels(launchers).gae(x, x, None, None, None, dispatch.scalars(0.9, 0.9))


def test_what_is_written_in_place_has_unit_stride(launchers):
    """A copy would be written instead, and nothing be said; others write back."""
    for name in ("ppo_loss_", "rescale_", "token_logprobs_backward_"):
        arguments = list(_samples(launchers)[name][0])
        schema = getattr(dispatch.kernels(launchers), name).default._schema.arguments
        at = next(i for i, x in enumerate(schema) if x.name in ("logits", "grad"))
        plain, strided = arguments[at].clone(), arguments[at].mT.contiguous().mT
        op = getattr(dispatch.kernels(launchers), name)
        op(*arguments[:at], plain, *arguments[at + 1 :])
        try:
            op(*arguments[:at], strided, *arguments[at + 1 :])
        except ValueError as error:
            assert "must have stride 1" in str(error)
        else:
            assert strided.equal(plain)
