r"""Log-probabilities, entropy and PPO loss from hidden states, without ever all logits in memory.

For a token's hidden state h (D,) and a head of weight W (V, D) and bias b (V,), the logits are::

    z = softcap(logit_scale (W h + b)),    softcap(x) = c tanh(x / c)

and go into the formulas of `ppo_kernels.logprobs` and `ppo_kernels.ppo_loss`. With g the gradient
of the result in W h + b, summed over tokens::

    ∂/∂h = Wᵀ g        ∂/∂W = Σ g hᵀ        ∂/∂b = Σ g

Tokens are taken in chunks. The loss needs three matrix products: a chunk's logits are made in a
buffer, their gradient takes their place (`ppo_loss_`) and goes at once into the gradients above.
Log-probs, whose upstream gradient comes later, make a chunk's logits once more in their backward. A
call holds one chunk and the gradients that it returns. A logit scale without a softcap is part of
the temperature and costs nothing.
"""

import torch
from torch import Tensor

from ppo_kernels import checks, reference, schemas
from ppo_kernels.dispatch import kernels, resolve, scalars, temperatures_and_number
from ppo_kernels.linear_chunks import CHUNK_BYTES
from ppo_kernels.logprobs import LogprobsAndEntropy, within
from ppo_kernels.ppo_loss import PPOLoss, checked_loss, for_kernel, promoted_loss
from ppo_kernels.schemas import LossInputs, Objective


def _cast(dtype, *tensors):
    """To the dtype that autocast asks for, if any."""
    return tuple(x if x is None or dtype is None else x.to(dtype) for x in tensors)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, dtype, wanted, chunking, hidden, weight, bias, *rest):
        ctx.set_materialize_grads(False)
        logprobs, entropy, stats = kernels(backend).linear_token_logprobs(
            *_cast(dtype, hidden, weight, bias), *rest, *chunking[1:]
        )
        head_scalars, tokens, mask, *others = rest
        # A clone: results are the caller's to write to.
        known = tokens, entropy.clone(), stats, *others
        ctx.save_for_backward(mask, hidden, weight, bias, head_scalars, *known)
        ctx.call = backend, dtype, wanted, chunking, len(rest)
        return logprobs, entropy

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_logprobs, grad_entropy):
        backend, dtype, wanted, chunking, rest = ctx.call
        mask, *saved = ctx.saved_tensors
        head, known = saved[:3], saved[3:]
        grads = (None,) * 3
        if grad_logprobs is not None or grad_entropy is not None:
            grads = kernels(backend).linear_token_logprobs_backward(
                within(mask, grad_logprobs),
                within(mask, grad_entropy),
                *(*_cast(dtype, *head), *known, *wanted, *chunking),
            )
            dtypes = [None if x is None else x.dtype for x in head]
            grads = _given(wanted, dtypes, grads)
        return None, None, None, None, *grads, *(None,) * rest


class _LinearPPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, dtype, wanted, chunking, hidden, weight, bias, *rest):
        *results, grad_hidden, grad_weight, grad_bias = kernels(backend).linear_ppo_loss(
            *_cast(dtype, hidden, weight, bias), *rest, *wanted, *chunking
        )
        ctx.mark_non_differentiable(*results[1:])
        grads = grad_hidden, grad_weight, grad_bias
        # fp16 does not hold gradients that a loss scale is yet to multiply.
        held = [None if x is None else schemas.unscaled_dtype(x) for x in (hidden, weight, bias)]
        ctx.save_for_backward(*_given(wanted, held, grads))
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.backend, ctx.wanted, ctx.rest, ctx.spent = backend, wanted, len(rest), False
        return tuple(results)

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_loss, *_):
        if ctx.spent:
            raise RuntimeError(
                "linear_ppo_loss can be differentiated once: its gradients are made in the forward "
                "and the first backward handed them on; call it again to differentiate again"
            )
        ctx.spent = True
        grads = ctx.saved_tensors
        for grad in grads:
            if grad is not None:
                kernels(ctx.backend).rescale_(grad, grad_loss)
        grads = _given(ctx.wanted, ctx.dtypes, grads)
        return None, None, None, None, *grads, *(None,) * ctx.rest


def _given(wanted, dtypes, grads):
    """The gradients that are wanted, in these dtypes."""
    triples = zip(wanted, dtypes, grads, strict=True)
    return tuple(grad.to(dtype) if wants else None for wants, dtype, grad in triples)


def _counted(head, mask):
    """A head whose hidden states are 0 where masked out."""
    return within(None if mask is None else mask.unsqueeze(-1), head[0]), *head[1:]


def _reference_logits(head, mask, dtype, wanted, chunking, *of_logits):
    _, logits_dtype, _ = chunking
    head = _cast(logits_dtype, *_cast(dtype, *_counted(head, mask)))
    if dtype is None:
        return reference.linear_logits(*head, *of_logits)
    with torch.autocast(head[0].device.type, enabled=False):
        return reference.linear_logits(*head, *of_logits)


def _wanted(*tensors):
    enabled = torch.is_grad_enabled()
    return tuple(enabled and x is not None and x.requires_grad for x in tensors)


def _checked_head(
    hidden,
    weight,
    bias,
    tokens,
    temperature,
    softcap,
    logit_scale,
    grad_weight_dtype,
    logits_dtype,
    chunk_bytes,
):
    """Check the arguments that all ops share; return the head (hidden, weight, bias), tokens,
    temperature, (softcap, logit_scale), and the call: autocast's dtype, which gradients are wanted,
    and (the dtype that the weight's is added up in, that of the logits, bytes of a chunk)."""
    checks.floating("hidden", hidden)
    checks.floating("weight", weight)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have shape (..., D) with D >= 1, got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (V, D) with V >= 1, got {tuple(weight.shape)}")
    expected = torch.Size((weight.shape[0], hidden.shape[-1]))
    checks.same("weight", weight, "hidden", expected, hidden.device)
    if bias is not None:
        checks.floating("bias", bias)
        checks.same("bias", bias, "weight", weight.shape[:1], hidden.device)
    tokens = checks.integer("tokens", tokens)
    like = "hidden without its last dimension"
    checks.same("tokens", tokens, like, hidden.shape[:-1], hidden.device)
    temperature = checks.temperature(temperature, tokens)
    logit_scale = checks.number("logit_scale", logit_scale, above=0)
    if softcap is not None:
        softcap = checks.number("softcap", softcap, above=0)
    device = hidden.device.type
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    chunk_bytes = checks.number("chunk_bytes", chunk_bytes, above=0)
    dtype, autocast = None, torch.amp.is_autocast_available(device)
    if (
        autocast
        and torch.is_autocast_enabled(device)
        and torch.float64 not in (hidden.dtype, weight.dtype)
    ):
        dtype = torch.get_autocast_dtype(device)
    for name, x in (("weight", weight), ("bias", bias)):
        if dtype is None and x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must be {hidden.dtype} like hidden, got {x.dtype}")
    if grad_weight_dtype not in (None, torch.float32, weight.dtype):
        raise ValueError(
            f"grad_weight_dtype must be None, torch.float32 or {weight.dtype}, "
            f"got {grad_weight_dtype}"
        )
    sum_dtype = torch.promote_types(grad_weight_dtype or weight.dtype, weight.dtype)
    head, wanted = (hidden, weight, bias), _wanted(hidden, weight, bias)
    if any(wanted):
        head = tuple(None if x is None else checks.constant(x) for x in head)
    own = dtype or hidden.dtype
    if logits_dtype not in (None, own, torch.promote_types(own, torch.float32)):
        raise ValueError(
            f"logits_dtype must be None, {own} or, if that is half precision, torch.float32, "
            f"got {logits_dtype}"
        )
    call = dtype, wanted, (sum_dtype, logits_dtype or own, int(chunk_bytes))
    return head, tokens, temperature, (softcap, logit_scale), call


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    grad_weight_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`token_logprobs` of logits that a head makes of hidden states, see `ppo_kernels.linear`.

    Args:
        hidden: (..., D) fp32, bf16, fp16 or fp64; the state at a position scores the token there.
        weight: (V, D), of the dtype of `hidden`; under torch.autocast both take autocast's.
        tokens: (...) int64 or int32 ids in [0, V).
        mask: (...) bool, True = counts; None counts all. Other hidden states, tokens and
            temperatures are not read: they have log-probability, entropy and gradient 0. On the CPU
            they cost nothing, on a GPU the products.
        bias: (V,), added to the logits; -inf excludes a token, unless there is a softcap.
        temperature: > 0, a number or (...) one per token, of which no gradient is taken.
        softcap: c > 0 for logits c tanh(x / c), as Gemma 2 has it; None for none.
        logit_scale: > 0, multiplies the logits before the softcap, as Cohere has it.
        grad_weight_dtype: torch.float32 adds up the chunks' parts of a bf16 or fp16 gradient in
            fp32, which takes twice its memory until the sum is rounded; None adds in its dtype.
        logits_dtype: torch.float32 multiplies bf16 or fp16 hidden states and weights, and keeps the
            logits and their gradient, in fp32; None in the dtype of the head. Slower: products of
            half precision have hardware of their own.
        chunk_bytes: of the logits that are in memory at a time; by default 96 MiB on a CPU and
            512 MiB on a GPU. A backward holds as much. Results differ by roundings of the products.
        backend: "auto", "native", "triton" or "reference", which makes all logits at once.

    Returns:
        (...) log-probabilities in nats, fp32 (fp64 for fp64 hidden states), differentiable in
        `hidden`, `weight` and `bias`; tokens without upstream gradient cost a backward nothing.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range; the message names
            it. Ids are looked at on the CPU only, see `check_logprobs`.
    """
    return linear_token_logprobs_and_entropy(
        hidden,
        weight,
        tokens,
        mask,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        grad_weight_dtype=grad_weight_dtype,
        logits_dtype=logits_dtype,
        chunk_bytes=chunk_bytes,
        backend=backend,
    ).logprobs


def linear_token_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    grad_weight_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> LogprobsAndEntropy:
    """`linear_token_logprobs` and the entropy of each row, at no further sweep over the vocabulary.

    Arguments and errors are those of `linear_token_logprobs`.

    Returns:
        LogprobsAndEntropy: `logprobs` (...) and `entropy` (...), both differentiable.
    """
    head, tokens, temperature, (softcap, logit_scale), call = _checked_head(
        hidden,
        weight,
        bias,
        tokens,
        temperature,
        softcap,
        logit_scale,
        grad_weight_dtype,
        logits_dtype,
        chunk_bytes,
    )
    mask = checks.boolean("mask", mask, "tokens", tokens)
    backend = resolve(backend, hidden)
    if backend == "reference":
        logits = _reference_logits(head, mask, *call, softcap, logit_scale)
        results = reference.token_logprobs_and_entropy(
            logits, tokens, mask, temperature=temperature
        )
    else:
        temperatures, number = temperatures_and_number(temperature)
        rest = scalars(logit_scale, softcap), tokens, mask, temperatures, scalars(number)
        results = _LinearTokenLogprobs.apply(backend, *call, *head, *rest)
    return LogprobsAndEntropy(*results)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_estimator: str = "k3",
    temperature: float | Tensor = 1.0,
    denominator: float | Tensor | None = None,
    grad_weight_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> PPOLoss:
    """`ppo_loss` of the logits that a head makes of hidden states, see `ppo_kernels.linear`.

    The gradients are made in the forward, those that are asked for: with a frozen head or frozen
    hidden states a product less, without autograd none. `loss.backward()` hands them on, scaled by
    the upstream gradient; it can be called once. Of fp16 they are held in fp32 until then, because
    it may be a loss scale that makes them representable; that takes a sweep more.

    Args:
        hidden, weight, bias, softcap, logit_scale, grad_weight_dtype, logits_dtype, backend: as in
            `linear_token_logprobs`.
        tokens, old_logprobs, advantages, mask and the other keywords: as in `ppo_loss`. Masked-out
            hidden states are not read; on the CPU they cost nothing, on a GPU the products.
        chunk_bytes: as in `linear_token_logprobs`; a softcap halves the tokens in a chunk.

    Returns:
        PPOLoss; `loss` is differentiable in `hidden`, `weight` and `bias`.

    Raises:
        TypeError, ValueError: as `linear_token_logprobs` and `ppo_loss`.
    """
    head, tokens, temperature, (softcap, logit_scale), call = _checked_head(
        hidden,
        weight,
        bias,
        tokens,
        temperature,
        softcap,
        logit_scale,
        grad_weight_dtype,
        logits_dtype,
        chunk_bytes,
    )
    inputs, objective = checked_loss(
        LossInputs(tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, temperature),
        Objective(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator),
        importance_weights,
    )
    backend = resolve(backend, hidden)
    if backend == "reference":
        logits = _reference_logits(head, inputs.mask, *call, softcap, logit_scale)
        results = reference.ppo_loss(logits, inputs, objective)
    else:
        rest = scalars(logit_scale, softcap), *for_kernel(inputs, objective)
        results = _LinearPPOLoss.apply(backend, *call, *head, *rest)
    return promoted_loss(results, head[0], inputs)
