"""Triton's interpreter for tests: it rounds as GPUs do, and is quick.

It patches `triton.language` anew in each call of a device function, and scans element by element
where slices along the axis would do: both are done once here, the operations and their order stay.
"""

import numpy
import torch

from ppo_kernels import dispatch


def prepare():
    """To be called once; does nothing where Triton is not interpreted."""
    if not dispatch.INTERPRETED or dispatch.why_not("triton", "cpu") is not None:
        return
    from triton.runtime import interpreter

    _round_to_nearest(interpreter)
    # That of Triton 3.6 is another one, and stays as it is.
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _PatchedOnce(interpreter)
        interpreter.ScanOps.generic_scan = _scan


def _round_to_nearest(interpreter):
    """From fp32 to bf16, where the interpreter cuts off."""
    language, builder = interpreter.tl, interpreter.InterpreterBuilder
    cut = builder.cast_impl

    def cast(self, x, to):
        if (x.dtype.scalar, to.scalar) != (language.float32, language.bfloat16):
            return cut(self, x, to)
        rounded = torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, language.bfloat16)

    builder.cast_impl = cast


class _PatchedOnce:
    """`_patch_lang` of the kernel that runs, and of its device functions where they need more."""

    def __init__(self, interpreter):
        self.patch = interpreter._patch_lang
        self.languages = {id(interpreter.tl), id(interpreter.tl.core)}
        self.patched, self.scopes = set(), []

    def __call__(self, function):
        needed = self.languages.intersection(map(id, function.__globals__.values()))
        if not needed <= self.patched:
            self.patched |= needed
            self.scopes.append(self.patch(function))
        return self

    def restore(self):
        """Called by the kernel's executor at its end."""
        while self.scopes:
            self.scopes.pop().restore()
        self.patched.clear()


def _scan(self, inputs):
    """`ScanOps.generic_scan`."""
    columns = [numpy.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    results = [numpy.empty_like(x) for x in columns]
    total = None
    for i in range(len(columns[0])):
        here = [self.to_tensor(x[i], y.dtype) for x, y in zip(columns, inputs, strict=True)]
        total = here if total is None else self.combine_fn.fn(*total, *here)
        total = total if isinstance(total, (tuple, list)) else (total,)
        for result, x in zip(results, total, strict=True):
            result[i] = x.handle.data.reshape(result[i].shape)
    results = [numpy.ascontiguousarray(numpy.moveaxis(x, 0, self.axis)) for x in results]
    return [self.to_tensor(x, y.dtype) for x, y in zip(results, inputs, strict=True)]
