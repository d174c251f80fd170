"""Few rows, which ops over the vocabulary split over blocks, have the bits of many, which they do
not."""

import pytest
import torch

from ppo_kernels import dispatch
from tests.conftest import CUDA, DTYPES, TRITON, emulates_a_gpu

# A row is a few steps of a block's threads; of the second no vector is aligned.
VOCABULARIES = (10_000, 10_001)
# Blocks to a multiprocessor that rows are split for.
BLOCKS = 8


def results(backend, logits, ref_logits, tokens, upstream):
    """Of each op that splits rows: name -> what it returns or writes."""
    ops, numbers = dispatch.kernels(backend), dispatch.scalars(0.7)
    entropy, stats = ops.token_logprobs(logits, tokens, None, None, numbers)[1:]
    kl, *both = ops.kl_divergence(logits, ref_logits, None, None, numbers)
    given = logits, tokens, entropy, stats, None, numbers
    beside = ops.token_logprobs_backward(upstream, -upstream, *given)
    of_kl = ops.kl_divergence_backward(upstream, logits, ref_logits, kl, *both, None, numbers)
    in_place, scaled = logits.clone(), logits.clone()
    ops.token_logprobs_backward_(upstream, -upstream, in_place, *given[1:])
    ops.rescale_(scaled, torch.tensor(2.5))
    return {"kl": kl, "beside": beside, "in place": in_place, "of kl": of_kl, "scaled": scaled}


def inputs(rows, vocabulary, dtype):
    """Tokens all over the vocabulary, one of them outside; a row without an upstream gradient."""
    logits, ref_logits = (2 * torch.randn(2, rows, vocabulary)).to(dtype)
    tokens = torch.linspace(0, vocabulary - 1, rows).long()
    upstream = torch.randn(rows, dtype=torch.promote_types(dtype, torch.float32))
    tokens[2], upstream[1] = vocabulary, 0
    return logits, ref_logits, tokens, upstream


def one_multiprocessor(request, backend):
    """Where a device can be chosen; else how many there are."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.get_device_properties().multi_processor_count
    if backend == "native" and emulates_a_gpu(backend):
        request.getfixturevalue("emulated").device(shared_per_sm=12 << 10, multiprocessors=1)
    return 1


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", (*CUDA, *TRITON), indirect=True)
def test_a_row_alone_has_the_bits_that_it_has_among_many(request, fused, dtype, vocabulary):
    many = inputs(BLOCKS * one_multiprocessor(request, fused), vocabulary, dtype)
    expected = results(fused, *many)
    for first, last in ((0, 1), (1, 3), (BLOCKS - 1, BLOCKS)):
        few = results(fused, *(x[first:last] for x in many))
        for name, x in few.items():
            assert torch.equal(x.nan_to_num(7), expected[name][first:last].nan_to_num(7)), name
    assert torch.equal(expected["in place"].nan_to_num(7), expected["beside"].nan_to_num(7))
    assert expected["beside"][2].isnan().all() and (expected["beside"][1] == 0).all()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_order_of_blocks_matters(emulated, dtype, vocabulary):
    """Those of a row, which is written where another block reads, among them."""
    few = inputs(3, vocabulary, dtype)
    emulated.device(multiprocessors=1)
    first = results("native", *few)
    for seed in range(1, 6):
        emulated.seed(seed)
        for name, x in results("native", *few).items():
            assert torch.equal(x.nan_to_num(7), first[name].nan_to_num(7)), name


@pytest.mark.parametrize("op", ("backward", "backward_", "kl backward", "rescale_"))
def test_blocks(emulated, op):
    """As many as give each multiprocessor 8, of a step of their threads or more: 16 KiB for 512."""
    ops, numbers = dispatch.kernels("native"), dispatch.scalars(1.0)

    def blocks(rows, vocabulary, multiprocessors):
        emulated.device(multiprocessors=multiprocessors)
        logits, ones, stats = torch.zeros(rows, vocabulary), torch.ones(rows), torch.ones(rows, 2)
        saved = torch.zeros(rows, dtype=torch.int64), ones, stats
        if op == "rescale_":
            ops.rescale_(logits, torch.tensor(2.0))
        elif op == "kl backward":
            ops.kl_divergence_backward(ones, logits, logits, ones, stats, stats, None, numbers)
        else:
            getattr(ops, f"token_logprobs_{op}")(ones, None, logits, *saved, None, numbers)
        return emulated.last_blocks()

    assert blocks(1, 40_000, 132) == 10
    assert blocks(3, 40_000, 132) == 30
    assert blocks(3, 40_000, 1) == 3 * 3  # 4, 4 and 2 steps
    assert blocks(8, 40_000, 1) == 8
    assert blocks(1, 4096, 132) == 4  # of 128 threads
    assert blocks(1, 4097, 132) == 3  # of 256, not aligned


def test_programs(monkeypatch):
    """The same of Triton."""
    sweeps = pytest.importorskip("ppo_kernels._triton.sweeps", reason="Triton is not installed")

    def split(rows, vocabulary, multiprocessors):
        monkeypatch.setattr(sweeps, "_multiprocessors", lambda device: multiprocessors)
        return sweeps.split(torch.empty(rows, vocabulary))

    assert split(1, 40_000, 132) == (10, 4096)
    assert split(3, 40_000, 1) == (3, 4 * 4096)
    assert split(8, 40_000, 1) == (1, 40_960)
    assert split(0, 4096, 132) == (4, 1024)
