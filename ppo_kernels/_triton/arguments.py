"""Checks of a registered op's tensors before a kernel reads one: the twin of csrc/arguments.h."""

import functools

import torch

from ppo_kernels.schemas import SCHEMAS, result_dtype

_LEADING = ("logits", "rewards", "logprobs", "values", "x", "grad")
_KINDS = {
    "ref_logits": "like",
    "tokens": "ids",
    "mask": "mask",
    "dones": "mask",
    "softmax_stats": "stats",
    "ref_softmax_stats": "stats",
    "bootstrap_values": "row",
    "cu_seqlens": "bounds",
    "denominator": "double",
    "scale": "number",
    "scalars": "scalars",
}
_SCALARS = {"ppo_loss": 6, "ppo_loss_and_gradient": 6, "ppo_loss_": 6, "sample_tokens": 4}
_SCALARS |= {"clipped_policy_loss": 3, "gae": 2, "gae_packed": 2}
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)
_SCALAR_RULE = "contiguous float64 numbers on the CPU, one for each of a call"


@functools.cache
def _declared(op):
    """(names and kinds of its arguments, the place of the one that others are like)."""
    schema = SCHEMAS[op][0].split("->")[0].strip().strip("()")
    names = [argument.split()[-1] for argument in schema.split(", ")]
    leading = next(i for name in _LEADING for i, x in enumerate(names) if x == name)
    kinds = [_KINDS.get(name, "real") for name in names]
    if "backward" in op:
        saved = {"entropy": "exact", "kl": "exact"}
        kinds = [saved.get(name, kind) for name, kind in zip(names, kinds, strict=True)]
    return tuple(zip(names, kinds, strict=True)), leading


def check(op, arguments):
    declared, leading = _declared(op)
    first_name, first = declared[leading][0], arguments[leading]
    shape = per_token = tuple(first.shape)
    if first_name in ("logits", "grad"):
        if not shape or shape[-1] == 0:
            raise ValueError(f"{first_name} must have shape (..., V) with V >= 1, got {shape}")
        per_token = shape[:-1]
    given = [
        (name, kind, x)
        for (name, kind), x in zip(declared, arguments, strict=True)
        if isinstance(x, torch.Tensor)
    ]
    bounds = next((x.numel() for _, kind, x in given if kind == "bounds"), None)
    if op in ("gae", "discounted_sums") and bounds is None and len(shape) != 2:
        raise ValueError(f"{first_name} must have two dimensions, got {shape}")
    real = result_dtype(first)
    dtypes = {
        "ids": (_INTEGERS, "int64 or int32"),
        "bounds": (_INTEGERS, "int64 or int32"),
        "mask": ((torch.bool,), "bool"),
        "like": ((first.dtype,), "of the logits' dtype"),
        "exact": ((real,), "of the results' dtype"),
        "stats": ((real,), "of the results' dtype"),
        "double": ((torch.float64,), "float64"),
    }
    shapes = {
        "like": shape,
        "stats": (*per_token, 2),
        "row": per_token[:-1] if bounds is None else (bounds - 1,),
    }
    for name, kind, x in given:
        if kind == "scalars":
            numbers = x.dtype == torch.float64 and x.is_cpu and x.is_contiguous()
            _require(numbers and x.numel() >= _SCALARS.get(op, 1), name, _SCALAR_RULE)
            continue
        _require(x.device == first.device, name, "on the device of the other tensors")
        allowed, rule = dtypes.get(kind, (_FLOATING, "float32, float64, bfloat16 or float16"))
        _require(x.dtype in allowed, name, rule)
        if kind in ("number", "double"):
            _require(x.numel() == 1, name, "one number")
        elif kind == "bounds":
            inside = x.ndim == 1 and x.numel() > 0
            _require(inside, name, "in one dimension, with one element or more")
        elif name != first_name:
            expected = shapes.get(kind, per_token)
            if x.shape != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def _require(kept, name, rule):
    if not kept:
        raise ValueError(f"{name} must be {rule}")
