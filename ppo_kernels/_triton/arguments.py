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
    "denominator": "number",
    "scale": "number",
    "scalars": "scalars",
}
_SCALARS = {"ppo_loss": 6, "ppo_loss_and_gradient": 6, "ppo_loss_": 6, "sample_tokens": 4}
_SCALARS |= {"clipped_policy_loss": 3, "gae": 2, "gae_packed": 2}
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)


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
    first, bounds = arguments[leading], None
    of_logits = declared[leading][0] in ("logits", "grad")
    per_token = tuple(first.shape)
    _require(first.dtype in _FLOATING, declared[leading][0], "float32, 64, bfloat16 or float16")
    if of_logits:
        if not per_token or per_token[-1] == 0:
            raise ValueError(
                f"{declared[leading][0]} must have shape (..., V) with V >= 1, got {per_token}"
            )
        per_token = per_token[:-1]
    for (name, kind), x in zip(declared, arguments, strict=True):
        if kind == "bounds" and x is not None:
            _require(x.ndim == 1 and x.numel() > 0, name, "in one dimension, with one element")
            bounds = x.numel()
    if op == "gae" or (op == "discounted_sums" and bounds is None):
        name = declared[leading][0]
        if len(per_token) != 2:
            raise ValueError(f"{name} must have two dimensions, got {per_token}")
    shapes = {
        "like": tuple(first.shape),
        "stats": (*per_token, 2),
        "row": per_token[:-1] if bounds is None else (bounds - 1,),
    }
    for i, ((name, kind), x) in enumerate(zip(declared, arguments, strict=True)):
        if i == leading or not isinstance(x, torch.Tensor):
            continue
        if kind == "scalars":
            numbers = x.dtype == torch.float64 and x.is_cpu and x.is_contiguous()
            numbers = numbers and x.numel() >= _SCALARS.get(op, 1)
            _require(numbers, name, "contiguous float64 numbers on the CPU, one for each of a call")
            continue
        _require(x.device == first.device, name, "on the device of the other tensors")
        if kind in ("ids", "bounds"):
            _require(x.dtype in _INTEGERS, name, "int64 or int32")
        elif kind == "mask":
            _require(x.dtype == torch.bool, name, "bool")
        elif kind == "like":
            _require(x.dtype == first.dtype, name, "of the logits' dtype")
        elif kind in ("exact", "stats"):
            _require(x.dtype == result_dtype(first), name, "of the results' dtype")
        elif name == "denominator":
            _require(x.dtype == torch.float64, name, "float64")
        else:
            _require(x.dtype in _FLOATING, name, "float32, float64, bfloat16 or float16")
        if kind == "number":
            _require(x.numel() == 1, name, "one number")
        elif kind != "bounds":
            expected = shapes.get(kind, per_token)
            if x.shape != expected:
                raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def _require(kept, name, rule):
    if not kept:
        raise ValueError(f"{name} must be {rule}")
