r"""Mean and whitening over the counted positions of a mask::

    mean = Σ_mask x / denominator        whitened = (x - mean) / sqrt(var + eps)

with the biased variance over the mask. Masked-out positions are chosen away, not multiplied by
zero: a NaN there stays there.
"""

import torch
from torch import Tensor

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import denominator_on, kernels, resolve, scalars


class _MaskedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, denominator, backend):
        mean, weight = kernels(backend).masked_mean(x, mask, denominator)
        ctx.save_for_backward(mask, weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return mean

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_mean):
        mask, weight = ctx.saved_tensors
        grad = reference.chained(grad_mean, weight).to(ctx.dtype).expand(ctx.shape)
        return grad if mask is None else torch.where(mask, grad, 0.0), None, None, None


def masked_mean(
    x: Tensor,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sum of `x` over the mask divided by `denominator`.

    Args:
        x: (...) floating.
        mask: (...) bool, True = counts; None counts all.
        denominator: number or one-element tensor to divide by, at least 0; default the mask's
            sum. 0 counts as 1, so that an empty mask gives 0.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        Scalar, fp32 (fp64 for fp64 input), differentiable in `x`.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("x", x)
    mask = checks.boolean("mask", mask, "x", x)
    denominator = checks.denominator(denominator, x.device)
    backend = resolve(backend, x)
    if backend == "reference":
        return reference.masked_mean(x, mask, denominator)
    return _MaskedMean.apply(x, mask, denominator_on(x.device, denominator), backend)


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-8,
    group: "torch.distributed.ProcessGroup | None" = None,
    backend: str = "auto",
) -> Tensor:
    """`x` centred and scaled to unit variance over the mask; 0 where masked out. No gradient.

    A constant, as one token is, gives 0, whatever `eps`.

    Args:
        x: (...) floating.
        mask: (...) bool, True = counts; None counts all.
        eps: added to the variance, at least 0.
        group: a `torch.distributed` process group over whose ranks the moments are taken (runs on
            `reference`).
        backend: "auto", "native", "triton" or "reference".

    Returns:
        (...) fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("x", x)
    mask = checks.boolean("mask", mask, "x", x)
    eps = checks.number("eps", eps, at_least=0)
    if group is not None:
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend must be auto or reference with a group, got {backend!r}")
        backend = "reference"
    backend = resolve(backend, x)
    if backend == "reference":
        return reference.masked_whiten(x, mask, eps=eps, group=group)
    return kernels(backend).masked_whiten(x.detach(), mask, scalars(eps))
