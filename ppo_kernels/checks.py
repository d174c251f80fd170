"""Argument checks: each raises TypeError or ValueError naming argument, rule and value.

Those whose names begin with `refuse_` look at what tensors hold, where `value_checks_run`.
"""

import functools
import math

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def first_order(backward):
    """Make a Function's `backward` refuse `create_graph=True`: it would be taken as constant."""

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "ppo_kernels ops can be differentiated once, got create_graph=True; for a second "
                "derivative use backend='reference' (of an op that is not split over processes)"
            )
        return backward(ctx, *grads)

    return checked


def constant(x):
    """`x` such that autograd may save it: a copy of what was made in inference mode."""
    if torch.compiler.is_compiling() or not (x.is_inference() and torch.is_grad_enabled()):
        return x
    return x.clone()


def _whole(name, x):
    """A tensor has one shape and lies in one place."""
    if type(x) is not torch.Tensor and hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name} must be a plain tensor, got a {type(x).__name__}: take {name}.full_tensor(), "
            "or a vocab_parallel_* op where logits are sharded over the vocabulary"
        )
    if x.is_nested:
        raise TypeError(
            f"{name} must have one shape, got a nested tensor: take {name}.to_padded_tensor(0) and "
            f"a mask, or {name}.values()"
        )


def floating(name, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    _whole(name, x)
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def same(name, x, like_name, shape, device):
    """`x` has this shape and lies on this device, those of the argument `like_name`."""
    if x.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} to match {like_name}, got {tuple(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like {like_name}, got {x.device}")


def per_token(name, x, like_name, like):
    floating(name, x)
    same(name, x, like_name, like.shape, like.device)


def _got(x):
    return x.dtype if isinstance(x, torch.Tensor) else type(x).__name__


def boolean(name, x, like_name, like):
    """An optional mask -> the mask."""
    if x is None:
        return None
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {_got(x)}")
    _whole(name, x)
    if x.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {_got(x)}: take {name}.bool()")
    same(name, x, like_name, like.shape, like.device)
    return constant(x)


def integer(name, x):
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {_got(x)}")
    _whole(name, x)
    return constant(x)


def logits_and_tokens(logits, tokens):
    """The tokens, checked with their logits."""
    floating("logits", logits)
    tokens = integer("tokens", tokens)
    vocabulary("logits", logits)
    same("tokens", tokens, "logits without its last dimension", logits.shape[:-1], logits.device)
    return tokens


def vocabulary(name, x):
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., V) with V >= 1, got {tuple(x.shape)}")


def _python_number(name, x):
    """The number that a NumPy scalar, or a 0-d tensor whose value is at hand, holds."""
    if isinstance(x, torch.Tensor):
        if x.ndim > 0 or x.requires_grad or not value_checks_run(x):
            raise TypeError(
                f"{name} must be a Python number, or a 0-d tensor on the CPU without gradient and "
                f"outside of torch.compile, got a tensor of shape {tuple(x.shape)} on {x.device}, "
                f"requires_grad={x.requires_grad}"
            )
        x = x.item()
    elif getattr(x, "ndim", None) == 0:
        x = x.item()
    if not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a Python number, got {type(x).__name__}")
    return x


def number(name, x, *, above=None, at_least=None, at_most=None, finite=True):
    """A Python number within bounds, from whatever holds one."""
    if type(x) is not float and type(x) is not int:
        x = _python_number(name, x)
    if finite and not -math.inf < x < math.inf:
        raise ValueError(f"{name} must be finite, got {x}")
    if above is not None and not x > above:
        raise ValueError(f"{name} must be > {above}, got {x}")
    if at_least is not None and not x >= at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {x}")
    if at_most is not None and not x <= at_most:
        raise ValueError(f"{name} must be <= {at_most}, got {x}")
    return x


def whole_number(name, x, *, at_least):
    x = number(name, x, at_least=at_least)
    if not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name} must be a whole number, got {x}")
    return x


def temperature(x, tokens, like_name="tokens", **bounds):
    """A number within bounds, those of `number`, or else above 0, or a floating tensor like
    `tokens`, into which no gradient flows; the backend looks at its values where that waits for no
    device."""
    if not isinstance(x, torch.Tensor) or (x.ndim == 0 and x.is_cpu and not tokens.is_cpu):
        return number("temperature", x, **(bounds or {"above": 0}))
    if x.ndim == 0:
        x = (x if x.is_floating_point() else x.float()).expand(tokens.shape)
    per_token("temperature", x, like_name, tokens)
    return constant(x.detach())


def clip_range(
    clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[float, float, float | None]:
    """(clip_low, clip_high, dual_clip); clip_high and dual_clip may be inf, for no such clip."""
    clip_low = number("clip_low", clip_low, at_least=0, at_most=1)
    clip_high = number("clip_high", clip_high, at_least=0, finite=False)
    if dual_clip is not None:
        dual_clip = number("dual_clip", dual_clip, above=1, finite=False)
    return clip_low, clip_high, dual_clip


def decay(name, x, like, rows, mask):
    """gamma or lam: a number in [0, 1], or a tensor of them, one per row or of the shape of `like`.

    No gradient flows into a tensor; its values are looked at where they count and where that waits
    for no device.
    """
    if not isinstance(x, torch.Tensor) or (x.ndim == 0 and value_checks_run(x)):
        return number(name, x, at_least=0, at_most=1)
    floating(name, x)
    if x.shape not in ((), (rows,), like.shape):
        raise ValueError(
            f"{name} must be a number or have shape {tuple(like.shape)} like rewards, or {(rows,)} "
            f"with one per row, got {tuple(x.shape)}"
        )
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like rewards, got {x.device}")
    refuse_outside(name, x, 1, mask if x.shape == like.shape else None)
    return x.detach()


def _of_tokens(name, x, like_name, like):
    """A constant, one per token, or one per sequence: of the shape without its last dimension."""
    floating(name, x)
    of_sequences = like.shape[:-1]
    if x.ndim < like.ndim and x.shape == of_sequences:
        x = x.unsqueeze(-1).expand(like.shape)
    if x.shape != like.shape:
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)}, or {tuple(of_sequences)} with one per "
            f"sequence, to match {like_name}, got {tuple(x.shape)}"
        )
    same(name, x, like_name, like.shape, like.device)
    return constant(x.detach())


def advantages(x, importance_weights, mask, like_name, like):
    """Advantages per token times their importance weights, both of which scale the policy term."""
    x = _of_tokens("advantages", x, like_name, like)
    if importance_weights is None:
        return x
    weights = _of_tokens("importance_weights", importance_weights, like_name, like)
    refuse_outside("importance_weights", weights, torch.inf, mask)
    return x.to(torch.promote_types(x.dtype, torch.float32)) * weights


def denominator(x, device):
    """None, a Python number or a one-element tensor -> None, the number or a 0-d tensor.

    A tensor's value is not looked at: that would wait for the device.
    """
    if isinstance(x, torch.Tensor):
        if x.numel() != 1:
            raise ValueError(f"denominator must have one element, got shape {tuple(x.shape)}")
        if x.device != device and x.device.type != "cpu":
            raise ValueError(f"denominator must be on {device}, got {x.device}")
        return x.detach().reshape(())
    return None if x is None else number("denominator", x, at_least=0)


def writable(name, x):
    """`x` can take a gradient in place: unit stride in the last dimension, no shared elements."""
    if (
        not torch.compiler.is_compiling()
        and x.is_inference()
        and not torch.is_inference_mode_enabled()
    ):
        raise ValueError(
            f"{name} must not be made in inference mode and written outside of it, which autograd "
            f"forbids, got such a tensor: {name}.clone() can be written"
        )
    stride = x.stride()
    if x.shape[-1] > 1 and stride[-1] != 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got strides {stride}")
    dims = [(step, size) for step, size in zip(stride, x.shape, strict=True) if size > 1]
    for step, size in dims:
        spanned = sum(s * (n - 1) for s, n in dims if s <= step) - step * (size - 1)
        if step <= spanned:
            raise ValueError(
                f"{name} must not be expanded or have overlapping rows, got strides {stride}"
            )


def boundaries(name, x, like):
    """`cu_seqlens`; the backend looks at its values."""
    integer(name, x)
    if x.ndim != 1 or x.shape[0] == 0:
        raise ValueError(f"{name} must have shape (B + 1,), got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like rewards, got {x.device}")


def choice(name, x, allowed):
    if x not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {x!r}")


def value_checks_run(x):
    """Values are looked at where there are any, where that waits for no device and breaks no graph
    (fake tensors, which say that they are on the CPU, are of a type of their own, and what vmap
    has many of is none to look at)."""
    return (
        x.device.type == "cpu"
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and x.numel() > 0
    )


def _first(bad):
    return tuple(bad.nonzero()[0].tolist())


def refuse_where(bad, x, rule, mask=None):
    """Raise for the first counted element that is bad."""
    if mask is not None:
        bad = bad & mask
    if value_checks_run(bad) and bad.any():
        where = _first(bad)
        raise ValueError(f"{rule}, got {x[where]} at {list(where)}")


def refuse_out_of_range(tokens, vocabulary):
    if value_checks_run(tokens):
        bad = (tokens < 0) | (tokens >= vocabulary)
        refuse_where(bad, tokens, f"tokens must be in [0, {vocabulary})")


def refuse_temperature(temperature):
    if value_checks_run(temperature):
        bad = ~(temperature.isfinite() & (temperature > 0))
        refuse_where(bad, temperature, "temperature must be finite and > 0")


def refuse_impossible(logprobs, tokens):
    if value_checks_run(tokens):
        check_logprobs(logprobs, tokens)


def refuse_infinite(mask, **per_token):
    """Raise for a counted element that is not finite; a tensor may be None."""
    for name, x in per_token.items():
        if x is not None and value_checks_run(x):
            refuse_where(~x.isfinite(), x, f"{name} must be finite where they count", mask)


def refuse_outside(name, x, most, mask=None):
    """Raise for a counted element that is not finite or not in [0, most]."""
    if value_checks_run(x):
        bad = ~(x.isfinite() & (x >= 0) & (x <= most))
        rule = "finite and >= 0" if most == torch.inf else f"in [0, {most}]"
        refuse_where(bad, x, f"{name} must be {rule}", mask)


def refuse_unowned(tokens, owners, mask):
    """`owners`: in how many ranks' slices of the vocabulary each token is."""
    if value_checks_run(tokens):
        bad = owners != 1
        if mask is not None:
            bad &= mask
        if bad.any():
            where = _first(bad)
            raise ValueError(
                f"tokens must be in one rank's slice of the vocabulary, got {tokens[where]} at "
                f"{list(where)}, which {owners[where]} have: mend it, or vocab_start"
            )


def check_logprobs(logprobs, tokens, mask=None):
    bad = ~logprobs.isfinite()
    if mask is not None:
        bad &= mask
    if bad.any():
        where = _first(bad)
        raise ValueError(
            f"tokens must have finite log-probability, got {logprobs[where]} for token "
            f"{tokens[where]} at {list(where)}: mask it out or mend its logits (or its id)"
        )


def refuse_underflow(grad, dtype):
    """A gradient of which fp16 holds no digits must not be left in it."""
    if dtype == torch.float16 and value_checks_run(grad):
        largest = grad.abs().max() if grad.numel() else grad.new_zeros(())
        if 0 < largest < torch.finfo(dtype).tiny:
            raise ValueError(
                f"logits must be wider than float16 to hold a gradient of at most {largest}, "
                "below its normal numbers: under autograd a loss scale makes it larger"
            )
