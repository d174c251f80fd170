"""Argument checks: each raises TypeError or ValueError naming argument, rule and value."""

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


def floating(name, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
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
    """An optional mask."""
    if x is None:
        return
    if not isinstance(x, torch.Tensor) or x.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor (True = counts), got {_got(x)}")
    same(name, x, like_name, like.shape, like.device)


def integer(name, x):
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {_got(x)}")


def logits_and_tokens(logits, tokens):
    floating("logits", logits)
    integer("tokens", tokens)
    vocabulary("logits", logits)
    same("tokens", tokens, "logits without its last dimension", logits.shape[:-1], logits.device)


def vocabulary(name, x):
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., V) with V >= 1, got {tuple(x.shape)}")


def number(name, x, *, above=None, at_least=None, at_most=None):
    """A finite Python number within bounds."""
    if isinstance(x, torch.Tensor) or not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a Python number, got {type(x).__name__}")
    if not -math.inf < x < math.inf:
        raise ValueError(f"{name} must be finite, got {x}")
    if above is not None and not x > above:
        raise ValueError(f"{name} must be > {above}, got {x}")
    if at_least is not None and not x >= at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {x}")
    if at_most is not None and not x <= at_most:
        raise ValueError(f"{name} must be <= {at_most}, got {x}")


def temperature(x, tokens, like_name="tokens"):
    """A number, or a floating tensor like `tokens` -> (tensor or None, number).

    The number beside a tensor is 1. No gradient flows into a tensor; the backend looks at its
    values where that waits for no device.
    """
    if not isinstance(x, torch.Tensor):
        number("temperature", x, above=0)
        return None, x
    per_token("temperature", x, like_name, tokens)
    return x.detach(), 1.0


def clip_range(clip_low, clip_high, dual_clip):
    number("clip_low", clip_low, at_least=0, at_most=1)
    number("clip_high", clip_high, at_least=0)
    if dual_clip is not None:
        number("dual_clip", dual_clip, above=1)


def denominator(x, device):
    """None, a Python number or a one-element tensor -> None or a tensor on `device`.

    A tensor's value is not looked at: that would wait for the device.
    """
    if x is None:
        return None
    if isinstance(x, torch.Tensor):
        if x.numel() != 1:
            raise ValueError(f"denominator must have one element, got shape {tuple(x.shape)}")
        if x.device != device and x.device.type != "cpu":
            raise ValueError(f"denominator must be on {device}, got {x.device}")
        x = x.detach().reshape(())
    else:
        number("denominator", x, at_least=0)
    # A product: a copy to the device would wait, and `torch.tensor` recompile for each number.
    return torch.ones((), dtype=torch.float64, device=device) * x


def writable(name, x):
    """`x` can take a gradient in place: unit stride in the last dimension, no shared elements."""
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
