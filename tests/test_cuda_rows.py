"""The CUDA kernels on rows that begin and end anywhere in memory."""

import ctypes
import mmap
import multiprocessing

import pytest
import torch

from ppo_kernels import ppo_loss, ppo_loss_, token_logprobs_and_entropy, token_statistics
from tests.conftest import DTYPES, loss_inputs

PROT_NONE = 0  # of mprotect
# Rows of 4099 numbers are copied in bulk to a block or to several, kept without that, read twice.
DEVICES = {
    "H200": {},
    "small": {"shared_per_sm": 28 << 10},
    "A100": {"major": 8, "shared_per_block": 163 << 10, "shared_per_sm": 164 << 10},
    "tiny": {"shared_per_sm": 6 << 10},
}


def inputs(vocabulary, dtype):
    """Of three rows, whose tokens are at both ends and within."""
    drawn = loss_inputs(1, 3, vocabulary, dtype)
    drawn["tokens"] = torch.tensor([[0, vocabulary - 1, vocabulary // 2]])
    return drawn


def everything(drawn, logits):
    """What the ops that score tokens make of `logits`, which hold their gradient afterwards."""
    drawn = drawn | {"logits": logits, "entropy_coef": 0.1, "backend": "native"}
    scored, options = (logits, drawn["tokens"]), {"backend": "native"}
    results = [*token_logprobs_and_entropy(*scored, **options)]
    results += token_statistics(*scored, **options)
    leaf = logits.detach().requires_grad_()
    for of in (
        ppo_loss(**(drawn | {"logits": leaf})).loss,
        token_logprobs_and_entropy(leaf, drawn["tokens"], **options).logprobs.sum(),
    ):
        results += torch.autograd.grad(of, leaf)
    loss = ppo_loss_(**drawn)
    return [*results, *loss, logits]


@pytest.mark.parametrize("vocabulary", (4099, 4104))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_bits_do_not_depend_on_where_a_row_begins(emulated, device, dtype, vocabulary):
    """And what is beside the rows is neither read nor written."""
    drawn = inputs(vocabulary, dtype)
    emulated.device(**DEVICES[device])
    first = everything(drawn, drawn["logits"].clone())
    size = drawn["logits"].numel()
    for before in (1, 3, 6):
        emulated.device(**DEVICES[device])
        memory = torch.full((before + size + 8,), torch.nan, dtype=dtype)
        logits = memory[before:][:size].view_as(drawn["logits"]).copy_(drawn["logits"])
        for x, y in zip(everything(drawn, logits), first, strict=True):
            assert torch.equal(x, y)
        assert memory[:before].isnan().all() and memory[before + size :].isnan().all()
        if emulated.bulk_copies() > 0:
            begin, end = (x - logits.data_ptr() for x in emulated.bulk_range())
            assert 0 <= begin < end <= size * dtype.itemsize


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_touched_where_memory_ends(emulated, device, dtype):
    """Nor where it begins: it would end the process."""
    drawn = inputs(4099, dtype)
    emulated.device(**DEVICES[device])
    size, page = drawn["logits"].numel(), mmap.PAGESIZE
    pages = -(-size * dtype.itemsize // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (0, pages + 1):
        forbidden = ctypes.c_void_p(address + guard * page), ctypes.c_size_t(page)
        assert libc.mprotect(*forbidden, PROT_NONE) == 0
    for offset in (page, (pages + 1) * page - size * dtype.itemsize):
        logits = torch.frombuffer(memory, dtype=dtype, count=size, offset=offset)
        logits = logits.view_as(drawn["logits"]).copy_(drawn["logits"])
        process = multiprocessing.get_context("fork").Process(
            target=everything, args=(drawn, logits)
        )
        process.start()
        process.join()
        assert process.exitcode == 0
