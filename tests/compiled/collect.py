"""Compile every kernel of the Triton backend for GPUs that are not here, and measure it.

    python -m tests.compiled.collect cuda:90 hip:gfx942 > kernels.jsonl

To be run without Triton's interpreter. The registered ops are called on small CPU tensors, Triton
is told that the device is the one named, and a launch ends when its kernel is compiled: what is
compiled is what a user's call launches, specialised as it would be. A line of the output is a JSON
object with "op", "dtype", "call" and "target", and "kernel" with what it uses, or the "error" of a
call, or "recompiled": a call that differs in numbers only and did compile.
"""

import itertools
import json
import math
import sys
from typing import NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ppo_kernels import dispatch, schemas
from ppo_kernels._triton import sweeps
from tests.compiled import MEASURED, OPS, sass

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# V or T: few warps, and most, of rows aligned to 16 bytes; a chunk of each size, and several.
WIDTHS = {"logits": (136, 32_000), "gae": (20, 100, 500, 1501, 5000), "other": (5,)}
NUMBERS = {"gae": 2, "gae_packed": 2, "ppo_loss": 6, "ppo_loss_and_gradient": 6, "ppo_loss_": 6}
NUMBERS |= {"clipped_policy_loss": 3}


class Call(NamedTuple):
    """A call of an op on `rows` rows of V or T = `width`, with these of its optional inputs.

    `sample_tokens` filters where it has a mask. `strided` logits are `x[:, :-1]`; other tensors
    begin `offset` elements after an allocation does, of logits those whose rows are whole vectors:
    of others the compiler makes the same code twice.
    """

    op: str
    dtype: torch.dtype
    width: int
    given: tuple = ()
    strided: bool = False
    rows: int = 4
    offset: int = 0
    number: float = 0.5
    estimator: int = 2

    def __str__(self):
        return " ".join(("strided " * self.strided + str(self.width), *self.given))

    def run(self):
        op = getattr(dispatch.kernels("triton"), self.op)
        absent = set(optional(self.op)) - set(self.given)
        names = [x.name for x in op.default._schema.arguments]
        op(*(None if x in absent else self._argument(x) for x in names))

    def _argument(self, name):
        result = torch.float64 if self.dtype == torch.float64 else torch.float32
        rows = (self.rows // 2, 2) if self.strided else (self.rows,)
        wide, per_token = (*rows, self.width), rows
        if family(self.op) != "logits":
            end_to_end = self.op == "gae_packed" or "cu_seqlens" in self.given
            per_token = (self.rows * self.width,) if end_to_end else wide
        if name == "logits" and self.strided:
            return torch.zeros((rows[0], rows[1] + 1, self.width), dtype=self.dtype)[:, :-1]
        if name in ("logits", "ref_logits", "grad"):
            whole = self.width * self.dtype.itemsize % 16 == 0
            return self._zeros(wide, self.dtype) if whole else torch.zeros(wide, dtype=self.dtype)
        if name.endswith("softmax_stats"):
            return self._zeros((*per_token, 2), result)
        if name == "tokens":
            return self._zeros(per_token, torch.int64)
        if name in ("mask", "dones"):
            return self._zeros(per_token, torch.bool)
        if name == "bootstrap_values":
            return torch.zeros(self.rows, dtype=self.dtype)
        if name == "cu_seqlens":
            return torch.arange(self.rows + 1) * self.width
        if name in ("denominator", "scale"):
            return torch.ones((), dtype=torch.float64)
        if name == "scalars" and self.op == "sample_tokens":
            filters = (2, 0.5, self.number) if "mask" in self.given else (math.inf, 1.0, 0.0)
            return dispatch.scalars(self.number, *filters)
        if name == "scalars":
            return dispatch.scalars(*[self.number] * NUMBERS.get(self.op, 1))
        if name.endswith("estimator"):
            return self.estimator
        return self._zeros(per_token, result if family(self.op) == "logits" else self.dtype)

    def _zeros(self, shape, dtype):
        count = torch.Size(shape).numel()
        return torch.zeros(count + self.offset, dtype=dtype)[self.offset :].view(shape)


def optional(op):
    """Names of an op's optional inputs."""
    arguments = getattr(dispatch.kernels("triton"), op).default._schema.arguments
    return [x.name for x in arguments if str(x.type) == "Optional[Tensor]"]


def family(op):
    if "logits" in schemas.SCHEMAS[op][0] or op == "rescale_":
        return "logits"
    return "gae" if op in ("gae", "gae_packed", "discounted_sums") else "other"


def calls(op, thorough):
    """Calls that between them compile the op's kernels in every dtype, with none and with all of
    the optional inputs; if `thorough`, in each combination of these, temperatures beside all others
    only, and with none and all for the other widths and strided too."""
    names = optional(op)
    # A backward is called for at least one upstream gradient.
    fewest = 1 if op == "token_logprobs_backward" else 0
    # What else is given does not bear on how a row's temperature is read.
    others = [x for x in names if x != "temperatures"]
    subsets = [x for n in range(fewest, len(others) + 1) for x in itertools.combinations(others, n)]
    if others != names:
        subsets.append(tuple(names))
    extremes = dict.fromkeys((subsets[0], subsets[-1]))
    *narrower, last = WIDTHS[family(op)]
    for dtype in DTYPES:
        for given in subsets if thorough else extremes:
            yield Call(op, dtype, last, given)
        for width, given in itertools.product(narrower if thorough else (), extremes):
            yield Call(op, dtype, width, given)
        if thorough and op != "rescale_" and family(op) == "logits":
            yield Call(op, dtype, 32_001, subsets[-1], strided=True)


def like(call):
    """Calls that differ in numbers only and so must compile nothing."""
    for rows in (1, 2, 16, 34):
        yield call._replace(rows=rows)
    for number in (1.0, 0.0625):
        yield call._replace(number=number)
    for estimator in range(4):
        yield call._replace(estimator=estimator)
    if family(call.op) == "logits":
        # Where nothing is summed there is code for rows that begin elsewhere.
        if call.op != "rescale_":
            yield call._replace(offset=1)
        yield call._replace(width=call.width + 8)
    else:
        # Read in vectors of four where T and the pointers allow it.
        yield call._replace(width=call.width + 4)


class Driver:
    """Device i is the target i; nothing runs on it."""

    def __init__(self, targets):
        self.targets, self.device = targets, 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.targets[self.device]


def target(name):
    backend, arch = name.split(":")
    return GPUTarget("hip", arch, 64) if backend == "hip" else GPUTarget(backend, int(arch), 32)


def describe(kernel):
    function = kernel.src.fn
    name = f"{function.module.rpartition('.')[2]}.{function.__name__}"
    found = {"kernel": name, "warps": kernel.metadata.num_warps}
    if "cubin" in kernel.asm:
        registers, stack, code = sass.measure(kernel.asm["cubin"])
        found |= {"registers": registers, "stack": stack} | code._asdict()
        found["loops"] = [x._asdict() for x in code.loops]
    return found


def main(names):
    driver.set_active(Driver([target(name) for name in names]))
    compiled, launched, run = [], set(), JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if id(kernel) not in launched:
            launched.add(id(kernel))
            compiled.append(kernel)

    JITFunction.run = compile_only

    def report(call, **found):
        dtype = str(call.dtype).removeprefix("torch.")
        what = {
            "op": call.op,
            "dtype": dtype,
            "call": str(call),
            "target": names[driver.active.device],
        }
        print(json.dumps(what | found), flush=True)

    def compiles(call):
        """Whether the call did; reports why not."""
        compiled.clear()
        try:
            call.run()
        except Exception as error:
            report(call, error=f"{type(error).__name__}: {error}")
            return False
        return True

    for driver.active.device, name in enumerate(names):
        sweeps.WARP_SIZE = driver.active.get_current_target().warp_size
        for op in OPS:
            done = []
            launched.clear()  # Ops may share a kernel.
            for call in calls(op, thorough=name == MEASURED):
                if compiles(call):
                    done.append(call)
                    for kernel in compiled:
                        report(call, **describe(kernel))
            # What specialises does not depend on the target.
            for call in done if name == MEASURED else ():
                for other in like(call):
                    if compiles(other) and compiled:
                        report(call, recompiled=repr(other))


if __name__ == "__main__":
    main(sys.argv[1:])
