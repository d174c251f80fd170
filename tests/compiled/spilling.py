"""A kernel that must spill, to see that measurements say so. To be run without the interpreter."""

import json

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from tests.compiled import MEASURED
from tests.compiled.collect import Driver, describe, target


@triton.jit
def reverse(x_ptr, N: tl.constexpr):
    """One warp holds all of x between its loads and its stores: N / 32 registers a thread."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.debug_barrier()
    tl.store(x_ptr + N - 1 - i, x)


driver.set_active(Driver([target(MEASURED)]))
kernel = reverse.warmup(torch.float32, N=8192, num_warps=1, grid=(1,))
print(json.dumps(describe(kernel)))
