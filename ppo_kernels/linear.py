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

from ppo_kernels import checks, reference, schemas
from ppo_kernels.dispatch import kernels, resolve, scalars
from ppo_kernels.linear_chunks import CHUNK_BYTES
from ppo_kernels.logprobs import LogprobsAndEntropy
from ppo_kernels.ppo_loss import checked_arguments, for_kernel, promoted_loss


def _cast(dtype, *tensors):
    """To the dtype that autocast asks for, if any."""
    return tuple(x if x is None or dtype is None else x.to(dtype) for x in tensors)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, dtype, wanted, sum_dtype, chunk_bytes, hidden, weight, bias, *rest):
        ctx.set_materialize_grads(False)
        logprobs, entropy, stats = kernels(backend).linear_token_logprobs(
            *_cast(dtype, hidden, weight, bias), *rest, chunk_bytes
        )
        head_scalars, tokens, *others = rest
        # A clone: results are the caller's to write to.
        scored = tokens, entropy.clone(), stats
        ctx.save_for_backward(hidden, weight, bias, head_scalars, *scored, *others)
        ctx.call = backend, dtype, wanted, sum_dtype, chunk_bytes, len(rest)
        return logprobs, entropy

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_logprobs, grad_entropy):
        backend, dtype, wanted, *chunking, rest = ctx.call
        head, known = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        grads = (None,) * 3
        if grad_logprobs is not None or grad_entropy is not None:
            grads = kernels(backend).linear_token_logprobs_backward(
                grad_logprobs, grad_entropy, *_cast(dtype, *head), *known, *wanted, *chunking
            )
            dtypes = [None if x is None else x.dtype for x in head]
            grads = _given(wanted, dtypes, grads)
        return None, None, None, None, None, *grads, *(None,) * rest


class _LinearPPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, dtype, wanted, sum_dtype, chunk_bytes, hidden, weight, bias, *rest):
        *results, grad_hidden, grad_weight, grad_bias = kernels(backend).linear_ppo_loss(
            *_cast(dtype, hidden, weight, bias), *rest, *wanted, sum_dtype, chunk_bytes
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
        return None, None, None, None, None, *grads, *(None,) * ctx.rest


def _given(wanted, dtypes, grads):
    """The gradients that are wanted, in these dtypes."""
    triples = zip(wanted, dtypes, grads, strict=True)
    return tuple(grad.to(dtype) if wants else None for wants, dtype, grad in triples)


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
    chunk_bytes,
):
    """Check the arguments that all ops share; return (autocast's dtype, which gradients are wanted,
    the dtype that the weight's is added up in, bytes of a chunk)."""
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
    checks.integer("tokens", tokens)
    like = "hidden without its last dimension"
    checks.same("tokens", tokens, like, hidden.shape[:-1], hidden.device)
    checks.temperature(temperature, tokens)
    checks.number("logit_scale", logit_scale, above=0)
    if softcap is not None:
        checks.number("softcap", softcap, above=0)
    device = hidden.device.type
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    checks.number("chunk_bytes", chunk_bytes, above=0)
    dtype = None
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
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
    return dtype, _wanted(hidden, weight, bias), sum_dtype, int(chunk_bytes)


def linear_token_logprobs(
    hidden,
    weight,
    tokens,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    grad_weight_dtype=None,
    chunk_bytes=None,
    backend="auto",
):
    """`token_logprobs` of the logits that a head makes of hidden states; see the module.

    Args:
        hidden: (..., D) fp32, bf16, fp16 or fp64; the state at a position scores the token there.
        weight: (V, D), of the dtype of `hidden`; under torch.autocast both take autocast's.
        tokens: (...) int64 or int32 ids in [0, V).
        bias: (V,), added to the logits; -inf excludes a token, unless there is a softcap.
        temperature: > 0, a number or (...) one per token, of which no gradient is taken.
        softcap: c > 0 for logits c tanh(x / c), as Gemma 2 has it; None for none.
        logit_scale: > 0, multiplies the logits before the softcap, as Cohere has it.
        grad_weight_dtype: torch.float32 adds up the chunks' parts of a bf16 or fp16 gradient in
            fp32, which takes twice its memory until the sum is rounded; None adds in its dtype.
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
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        grad_weight_dtype=grad_weight_dtype,
        chunk_bytes=chunk_bytes,
        backend=backend,
    ).logprobs


def linear_token_logprobs_and_entropy(
    hidden,
    weight,
    tokens,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    grad_weight_dtype=None,
    chunk_bytes=None,
    backend="auto",
):
    """`linear_token_logprobs` and the entropy of each row, at no further sweep over the vocabulary.

    Arguments and errors are those of `linear_token_logprobs`.

    Returns:
        LogprobsAndEntropy: `logprobs` (...) and `entropy` (...), both differentiable.
    """
    call = _checked_head(
        hidden,
        weight,
        bias,
        tokens,
        temperature,
        softcap,
        logit_scale,
        grad_weight_dtype,
        chunk_bytes,
    )
    backend = resolve(backend, hidden)
    if backend == "reference":
        logits = reference.linear_logits(hidden, weight, bias, softcap, logit_scale)
        results = reference.token_logprobs_and_entropy(logits, tokens, temperature=temperature)
    else:
        temperatures, number = checks.temperature(temperature, tokens)
        rest = scalars(logit_scale, softcap), tokens, temperatures, scalars(number)
        results = _LinearTokenLogprobs.apply(backend, *call, hidden, weight, bias, *rest)
    return LogprobsAndEntropy(*results)


def linear_ppo_loss(
    hidden,
    weight,
    tokens,
    old_logprobs,
    advantages,
    mask=None,
    *,
    bias=None,
    softcap=None,
    logit_scale=1.0,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    entropy_coef=0.0,
    kl_coef=0.0,
    ref_logprobs=None,
    kl_estimator="k3",
    temperature=1.0,
    denominator=None,
    grad_weight_dtype=None,
    chunk_bytes=None,
    backend="auto",
):
    """`ppo_loss` of the logits that a head makes of hidden states; see the module for the formula.

    The gradients are made in the forward, those that are asked for: with a frozen head or frozen
    hidden states a product less, without autograd none. `loss.backward()` hands them on, scaled by
    the upstream gradient; it can be called once. Of fp16 they are held in fp32 until then, because
    it may be a loss scale that makes them representable; that takes a sweep more.

    Args:
        hidden, weight, bias, softcap, logit_scale, grad_weight_dtype, backend: as in
            `linear_token_logprobs`.
        tokens, old_logprobs, advantages, mask and the other keywords: as in `ppo_loss`. Masked-out
            hidden states are not read; on the CPU they cost nothing, on a GPU the products.
        chunk_bytes: as in `linear_token_logprobs`; a softcap halves the tokens in a chunk.

    Returns:
        PPOLoss; `loss` is differentiable in `hidden`, `weight` and `bias`.

    Raises:
        TypeError, ValueError: as `linear_token_logprobs` and `ppo_loss`.
    """
    call = _checked_head(
        hidden,
        weight,
        bias,
        tokens,
        temperature,
        softcap,
        logit_scale,
        grad_weight_dtype,
        chunk_bytes,
    )
    # Of hidden states the shape is looked at, which but for D is that of logits.
    arguments = checked_arguments(
        hidden,
        tokens,
        old_logprobs,
        advantages,
        mask,
        clip_low,
        clip_high,
        dual_clip,
        entropy_coef,
        kl_coef,
        ref_logprobs,
        kl_estimator,
        denominator,
        temperature,
    )
    backend = resolve(backend, hidden)
    if backend == "reference":
        if mask is not None:
            hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
        logits = reference.linear_logits(hidden, weight, bias, softcap, logit_scale)
        results = reference.ppo_loss(logits, *arguments)
    else:
        rest = scalars(logit_scale, softcap), *for_kernel(*arguments)
        results = _LinearPPOLoss.apply(backend, *call, hidden, weight, bias, *rest)
    return promoted_loss(results, hidden, old_logprobs, advantages, ref_logprobs)
