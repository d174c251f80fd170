"""masked_mean and masked_whiten."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ppo_kernels import masked_mean, masked_whiten
from tests.conftest import DTYPES, emulates_a_gpu

X = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
MASK = [[True, False, True], [True, True, False]]


def test_mean_by_hand(backend):
    x, mask = torch.tensor(X), torch.tensor(MASK)
    assert masked_mean(x, mask, backend=backend).item() == 13 / 4
    assert masked_mean(x, backend=backend).item() == 21 / 6
    for denominator in (8, 8.0, torch.tensor(8), torch.tensor([8.0])):
        assert masked_mean(x, mask, denominator, backend=backend).item() == 13 / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_gradient_and_dtypes(backend, dtype):
    x, mask = torch.tensor(X).to(dtype).requires_grad_(), torch.tensor(MASK)
    mean = masked_mean(x, mask, 8, backend=backend)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (3 * mean).backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, mask.to(dtype) * 3 / 8)


def test_mean_gradcheck(backend):
    x, mask = torch.tensor(X).double().requires_grad_(), torch.tensor(MASK)
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask, 5, backend=backend), x)
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, backend=backend), x)


@pytest.mark.parametrize("garbage", (math.nan, math.inf))
def test_garbage_outside_the_mask_is_ignored(backend, garbage):
    mask = torch.tensor(MASK)
    x = torch.tensor(X).masked_fill(~mask, garbage).requires_grad_()
    mean = masked_mean(x, mask, backend=backend)
    mean.backward()
    assert mean.item() == 13 / 4
    assert torch.equal(x.grad, mask / 4)
    clean = masked_whiten(torch.tensor(X), mask, backend=backend)
    assert torch.equal(masked_whiten(x, mask, backend=backend), clean)


@pytest.mark.parametrize("shape", ((2, 3), (0,), ()))
def test_empty_mask_gives_zero(backend, shape):
    x = torch.randn(shape).requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    mean = masked_mean(x, mask, backend=backend)
    mean.backward()
    assert mean.item() == 0
    assert torch.equal(x.grad, torch.zeros(shape))
    assert torch.equal(masked_whiten(x, mask, backend=backend), torch.zeros(shape))


def test_large_fp32_sums(backend):
    """A running fp32 sum of so many terms near 1000 would be off by far more."""
    x = 1000 + torch.rand(1 << (18 if emulates_a_gpu(backend) else 22))
    truth = x.double().mean().item()
    assert masked_mean(x, backend=backend).item() == pytest.approx(truth, rel=1e-6)


def test_whiten_by_hand(backend):
    """Over 1, 3, 4, 5: mean 13/4, biased variance 51/4 - 169/16 = 35/16."""
    whitened = masked_whiten(torch.tensor(X), torch.tensor(MASK), eps=0.0, backend=backend)
    expected = (torch.tensor(X) - 13 / 4) / math.sqrt(35 / 16)
    torch.testing.assert_close(whitened, expected * torch.tensor(MASK))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (0.0, 1000.0))
def test_whiten_centres_and_scales(backend, offset, dtype):
    x = (offset + torch.randn(40, 50)).to(dtype)
    mask = torch.rand(40, 50) < 0.7
    whitened = masked_whiten(x, mask, backend=backend)
    assert whitened.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    kept = x.double()[mask]
    truth = (kept - kept.mean()) / kept.var(correction=0).sqrt()
    tolerance = 1e-6 if dtype == torch.float64 else 1e-6 + 2e-7 * offset
    torch.testing.assert_close(whitened[mask].double(), truth, atol=tolerance, rtol=tolerance)
    assert (whitened[~mask] == 0).all()


@pytest.mark.parametrize("eps", (1e-8, 0.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whiten_of_a_constant_and_of_one_value_is_zero(backend, dtype, eps):
    """Of 0.1, too, whose sums are rounded, and over more than a block."""
    x = torch.full((9000,), 0.1).to(dtype)
    x[::7] = math.nan
    for kept in (~x.isnan(), torch.arange(9000) == 5000, torch.zeros(9000, dtype=torch.bool)):
        whitened = masked_whiten(x, kept, eps=eps, backend=backend)
        assert (whitened == 0).all()
    assert (masked_whiten(torch.tensor([2.0]), eps=eps, backend=backend) == 0).all()


def test_whiten_carries_no_gradient_and_takes_views(backend):
    x = torch.randn(6, 4, requires_grad=True)
    mask = torch.rand(6, 4) < 0.7
    whitened = masked_whiten(x.t(), mask.t(), backend=backend)
    assert not whitened.requires_grad
    copied = masked_whiten(x.t().contiguous(), mask.t().contiguous(), backend=backend)
    torch.testing.assert_close(whitened, copied)


def _whiten_on_one_rank(rank, folder, x, mask):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    whitened = masked_whiten(x[rank], mask[rank], group=dist.group.WORLD)
    torch.save(whitened, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_whiten_over_a_process_group_is_whiten_of_the_whole(tmp_path):
    """Two ranks of unlike means and counts; each alone would come out centred on its own."""
    x = torch.randn(2, 3, 5, dtype=torch.float64) + torch.tensor([0.0, 10.0]).reshape(2, 1, 1)
    mask = torch.rand(2, 3, 5) < torch.tensor([0.9, 0.3]).reshape(2, 1, 1)
    mp.spawn(_whiten_on_one_rank, args=(str(tmp_path), x, mask), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = masked_whiten(x, mask, backend="reference")
    torch.testing.assert_close(torch.stack(parts), whole, atol=1e-12, rtol=0)


def test_second_derivative_is_refused(fused):
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(masked_mean(x, backend=fused), x, create_graph=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(3).int()}, TypeError, "x must be float32.*int32"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be a bool tensor.*float32"),
        ({"mask": torch.ones(4).bool()}, ValueError, r"mask must have shape \(3,\).*\(4,\)"),
        ({"mask": torch.ones(3, device="meta").bool()}, ValueError, "mask must be on cpu.*meta"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, .*got 'fast'"),
    ],
    ids=lambda x: "",
)
@pytest.mark.parametrize("function", (masked_mean, masked_whiten))
def test_bad_arguments_are_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{"x": torch.ones(3)} | arguments)


@pytest.mark.parametrize(
    ("denominator", "error", "message"),
    [
        (-1, ValueError, "denominator must be >= 0, got -1"),
        (math.nan, ValueError, "denominator must be finite, got nan"),
        ("3", TypeError, "denominator must be a Python number, got str"),
        (torch.ones(2), ValueError, r"denominator must have one element, got shape \(2,\)"),
        (torch.ones((), device="meta"), ValueError, "denominator must be on .*got meta"),
    ],
)
def test_bad_denominators_are_named(backend, denominator, error, message):
    with pytest.raises(error, match=message):
        masked_mean(torch.ones(3), None, denominator, backend=backend)


def test_bad_whitening_arguments_are_named(backend):
    with pytest.raises(ValueError, match="eps must be >= 0, got -1"):
        masked_whiten(torch.ones(3), eps=-1, backend=backend)
