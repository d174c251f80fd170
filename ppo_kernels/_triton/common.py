"""What the launchers of every family share."""

import contextlib
import functools
import inspect
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ppo_kernels._triton.arguments import check
from ppo_kernels.schemas import NAMESPACE

_library = torch.library.Library(NAMESPACE["triton"], "IMPL")


def implement(name):
    """Register a launcher as the op `name`, behind the check of its tensors; the first one says on
    which device it runs."""

    def register(launcher):
        @functools.wraps(launcher)
        def on_device_of_first(*arguments):
            check(name, arguments)
            device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
            if device.type == "cpu":
                return launcher(*arguments)
            with torch.cuda.device(device):
                return launcher(*arguments)

        _library.impl(name, on_device_of_first, "CompositeExplicitAutograd")
        return launcher

    return register


def kernel(*vectors):
    """`triton.jit` for kernels that are compiled once for all numbers.

    Triton otherwise compiles anew for a 1, for multiples of 16 and for aligned pointers. Here
    integers annotated `tl.int32` or `tl.int64` are runtime numbers of any value, those annotated
    `tl.float64` arrive as doubles, and of the pointers, which have no annotation, only those named
    in `vectors`, read or written 16 bytes at a time, are told apart by their alignment.
    """

    def compile_once(function):
        kinds = function.__annotations__
        pointers = [x for x in inspect.signature(function).parameters if x not in kinds]
        return triton.jit(
            do_not_specialize=[x for x in kinds if kinds[x] in (tl.int32, tl.int64)],
            do_not_specialize_on_alignment=[x for x in pointers if x not in vectors],
        )(function)

    return compile_once


@triton.jit
def row_counts(mask_ptr, row):
    """True where a mask, or none, lets a row count."""
    counts = True
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row) != 0
    return counts


def launch(function, programs, *arguments, **options):
    """Run a kernel on a grid of `programs`; none is no launch."""
    if programs:
        function[(programs,)](*arguments, **options, enable_fp_fusion=True)


class Rows(NamedTuple):
    """Rows of a (..., V) tensor where they lie: row i starts, in elements from the pointer of
    `data`, at (i // inner) * outer_stride + (i % inner) * inner_stride."""

    data: torch.Tensor
    inner: int
    outer_stride: int
    inner_stride: int


def _row_dims(x):
    """(size, stride) of the leading dimensions, those that follow on each other as one."""
    dims = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def begins_aligned(x):
    """False for rows of whole vectors of 16 bytes that begin elsewhere than at one."""
    vector = 16 // x.element_size()
    if x.shape[-1] % vector != 0:
        return True
    return x.data_ptr() % 16 == 0 and all(stride % vector == 0 for _, stride in _row_dims(x))


def _in_rows(x, anywhere):
    """`x`, or a copy if V has no unit stride, two strides do not tell where its rows are, or these
    do not begin aligned: the compiler would sum them in another order."""
    unit_stride = x.shape[-1] == 1 or x.stride(-1) == 1
    if unit_stride and len(_row_dims(x)) <= 2 and (anywhere or begins_aligned(x)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def rows(x, anywhere=False):
    """Rows of `x` (..., V), without a copy if possible; they may begin `anywhere` if nothing is
    summed."""
    x = _in_rows(x, anywhere)
    (_, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *_row_dims(x)][-2:]
    return Rows(x, inner, outer_stride, inner_stride)


@contextlib.contextmanager
def written_in_place(x, anywhere=False):
    """`x` in a form that `rows` does not copy; what is written there is in `x` afterwards."""
    target = _in_rows(x, anywhere)
    yield target
    if target is not x:
        x.copy_(target)


def per_token(x):
    """An optional tensor of a few numbers per token, contiguous."""
    return None if x is None else x.contiguous()
