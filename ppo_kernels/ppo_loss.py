r"""The clipped PPO loss (Schulman et al., 2017, arXiv:1707.06347), from logits or from log-probs.

Per counted token, with r = exp(logprob - old_logprob) and advantage A::

    policy = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
             and, with dual_clip c, at most -A c where A < 0   (Ye et al., 2020, arXiv:1912.09729)
    loss   = policy - entropy_coef H + kl_coef kl(logprob, ref_logprob)

summed over the mask and divided by `denominator`. The loss reaches the logits through two numbers
per token, g = ∂loss/∂logprob and h = ∂loss/∂H, so that (see `ppo_kernels.logprobs`)::

    ∂loss/∂z_j = (g (1[j = a] - p_j) - h p_j (log p_j + H)) / τ
"""

from typing import NamedTuple

import torch

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import kernels, resolve, scalars


class PPOLoss(NamedTuple):
    """What `ppo_loss` gives. All but `loss` are detached; scalars are means over the denominator.

    `entropy` is the full-vocabulary entropy, `kl` the chosen estimate against the reference (0
    without one), `approx_kl` the k3 estimate of KL(old || new), `clip_fraction` the share of tokens
    where clipping acts; `logprobs` and `token_entropy` (...) are 0 where masked out.
    """

    loss: torch.Tensor
    policy_loss: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    approx_kl: torch.Tensor
    clip_fraction: torch.Tensor
    logprobs: torch.Tensor
    token_entropy: torch.Tensor


class PolicyLoss(NamedTuple):
    """Scalars; only `loss` carries a gradient."""

    loss: torch.Tensor
    approx_kl: torch.Tensor
    clip_fraction: torch.Tensor


class ValueLoss(NamedTuple):
    """Scalars; only `loss` carries a gradient."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor


def _chained(upstream, grad):
    """upstream · grad, with the zeros of `grad` kept under an upstream that is not finite."""
    return torch.where(grad == 0, 0.0, upstream * grad)


def _for_kernel(
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
    denominator,
    temperature,
    kl_estimator,
):
    """Arguments of `reference.ppo_loss` after the logits -> those of the registered ops."""
    numbers = scalars(temperature, clip_low, clip_high, dual_clip, entropy_coef, kl_coef)
    estimator = reference.ESTIMATORS.index(kl_estimator)
    return tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, numbers, estimator


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, tokens, *rest):
        *results, stats, grad_logprobs, grad_token_entropy = kernels(backend).ppo_loss(
            logits, tokens, *rest
        )
        numbers = rest[-2]
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(
            grad_logprobs, grad_token_entropy, logits, tokens, results[-1], stats, numbers
        )
        ctx.backend, ctx.rest = backend, len(rest)
        return tuple(results)

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_loss, *_):
        grad_logprobs, grad_token_entropy, *saved = ctx.saved_tensors
        grad_logits = kernels(ctx.backend).token_logprobs_backward(
            _chained(grad_loss, grad_logprobs), _chained(grad_loss, grad_token_entropy), *saved
        )
        return None, grad_logits, None, *(None,) * ctx.rest


class _PPOLossInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, *arguments):
        if backend == "reference":
            results = reference.ppo_loss_(logits, *arguments)
        else:
            results = kernels(backend).ppo_loss_(logits, *arguments)
            torch.autograd.graph.increment_version(logits)
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(logits.detach())
        ctx.backend, ctx.arguments, ctx.spent = backend, len(arguments), False
        return tuple(results)

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_loss, *_):
        if ctx.spent:
            raise RuntimeError(
                "ppo_loss_ can be differentiated once: its gradient lies in the logits' storage "
                "and the first backward handed it on; use ppo_loss to differentiate again"
            )
        ctx.spent = True
        (grad_logits,) = ctx.saved_tensors
        if ctx.backend == "reference":
            grad_logits.copy_(_chained(grad_loss, grad_logits))
        else:
            kernels(ctx.backend).rescale_(grad_logits, grad_loss)
        return None, grad_logits, *(None,) * ctx.arguments


def _checked(
    logits,
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
):
    """Check the arguments of a loss; return those after `logits`."""
    checks.logits_and_tokens(logits, tokens)
    checks.per_token("old_logprobs", old_logprobs, "tokens", tokens)
    checks.per_token("advantages", advantages, "tokens", tokens)
    checks.boolean("mask", mask, "tokens", tokens)
    checks.clip_range(clip_low, clip_high, dual_clip)
    checks.number("entropy_coef", entropy_coef, at_least=0)
    checks.number("kl_coef", kl_coef, at_least=0)
    checks.choice("kl_estimator", kl_estimator, reference.ESTIMATORS)
    checks.number("temperature", temperature, above=0)
    if ref_logprobs is not None:
        checks.per_token("ref_logprobs", ref_logprobs, "tokens", tokens)
        ref_logprobs = ref_logprobs.detach()
    elif kl_coef > 0:
        raise ValueError(f"ref_logprobs must be given when kl_coef > 0, got kl_coef={kl_coef}")
    return (
        tokens,
        old_logprobs.detach(),
        advantages.detach(),
        mask,
        clip_low,
        clip_high,
        dual_clip,
        entropy_coef,
        kl_coef,
        ref_logprobs,
        checks.denominator(denominator, logits.device),
        temperature,
        kl_estimator,
    )


def ppo_loss(
    logits,
    tokens,
    old_logprobs,
    advantages,
    mask=None,
    *,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    entropy_coef=0.0,
    kl_coef=0.0,
    ref_logprobs=None,
    kl_estimator="k3",
    temperature=1.0,
    denominator=None,
    backend="auto",
):
    """The clipped PPO loss of sampled tokens, straight from logits; see the module for the formula.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64; rows may be strided, V must not.
        tokens: (...) int64 or int32 ids, in [0, V) where they count.
        old_logprobs: (...) log-probs of the policy that sampled, in nats.
        advantages: (...) one per token.
        mask: (...) bool, True = counts; None counts all. Other rows are not read.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: bound c > 1 on the loss where the advantage is negative; None for no bound.
        entropy_coef, kl_coef: at least 0.
        ref_logprobs: (...) log-probs of the reference; needed when kl_coef > 0.
        kl_estimator: "k1", "k2", "k3" or "abs", as in `kl_estimate`.
        temperature: > 0, divides the logits.
        denominator: number or one-element tensor, the count to divide by (for gradient
            accumulation or data parallelism the global one); default the mask's sum. 0 counts as 1.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        PPOLoss; `loss` is differentiable in `logits`, with gradient 0 in rows that do not count.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range; on the CPU also a
            counted token whose log-probability is -inf or NaN. The message names it. On a GPU
            `loss` is NaN then; see `check_logprobs`.
    """
    arguments = _checked(
        logits,
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
    backend = resolve(backend, logits)
    if backend == "reference":
        return PPOLoss(*reference.ppo_loss(logits, *arguments))
    return PPOLoss(*_PPOLoss.apply(backend, logits, *_for_kernel(*arguments)))


def ppo_loss_(
    logits,
    tokens,
    old_logprobs,
    advantages,
    mask=None,
    *,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    entropy_coef=0.0,
    kl_coef=0.0,
    ref_logprobs=None,
    kl_estimator="k3",
    temperature=1.0,
    denominator=None,
    backend="auto",
):
    """`ppo_loss` that leaves ∂loss/∂logits in the storage of `logits`: two sweeps, no copy.

    The logits are gone afterwards, whether or not they require grad (and also when a counted token
    of log-probability -inf raises). Their version counter moves, so a graph that still needs them
    raises. `loss.backward()` hands the stored gradient on, scaled by the upstream gradient; it can
    be called once. A leaf's `.grad` then shares the leaf's storage. Parts of one tensor share its
    version: differentiate the loss of one before the call on another.

    Arguments, results and errors are otherwise those of `ppo_loss`; rows of `logits` must not
    overlap and the vocabulary must have stride 1 (ValueError).
    """
    arguments = _checked(
        logits,
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
    checks.writable("logits", logits)
    backend = resolve(backend, logits)
    if backend != "reference":
        arguments = _for_kernel(*arguments)
    return PPOLoss(*_PPOLossInPlace.apply(backend, logits, *arguments))


class _ScalarLoss(torch.autograd.Function):
    """A loss whose op gives (loss, …, gradient in the first argument) at once."""

    @staticmethod
    def forward(ctx, op, x, *rest):
        *results, grad = op(x, *rest)
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(grad)
        ctx.dtype, ctx.rest = x.dtype, len(rest)
        return tuple(results)

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_loss, *_):
        (grad,) = ctx.saved_tensors
        return None, _chained(grad_loss, grad).to(ctx.dtype), *(None,) * ctx.rest


def clipped_policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask=None,
    *,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    denominator=None,
    backend="auto",
):
    """The policy term of `ppo_loss` from log-probabilities at hand.

    Args:
        logprobs: (...) of the policy in training, in nats, differentiable.
        old_logprobs, advantages, mask, clip_low, clip_high, dual_clip, denominator, backend: as in
            `ppo_loss`.

    Returns:
        PolicyLoss (fp32, fp64 for fp64 input).

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("logprobs", logprobs)
    checks.per_token("old_logprobs", old_logprobs, "logprobs", logprobs)
    checks.per_token("advantages", advantages, "logprobs", logprobs)
    checks.boolean("mask", mask, "logprobs", logprobs)
    checks.clip_range(clip_low, clip_high, dual_clip)
    tensors = old_logprobs.detach(), advantages.detach(), mask
    denominator = checks.denominator(denominator, logprobs.device)
    backend = resolve(backend, logprobs)
    if backend == "reference":
        return PolicyLoss(
            *reference.clipped_policy_loss(
                logprobs, *tensors, clip_low, clip_high, dual_clip, denominator
            )
        )
    numbers = scalars(clip_low, clip_high, dual_clip)
    op = kernels(backend).clipped_policy_loss
    return PolicyLoss(*_ScalarLoss.apply(op, logprobs, *tensors, denominator, numbers))


def value_loss(
    values, old_values, returns, mask=None, *, clip=None, denominator=None, backend="auto"
):
    """Half the squared error of the critic, pessimistic about moves beyond `clip`.

    Per counted token max((v - R)², (old + clamp(v - old, -clip, clip) - R)²) / 2, summed over the
    mask and divided by `denominator` (the clipped value loss of the OpenAI baselines).

    Args:
        values: (...) of the critic in training, differentiable.
        old_values, returns: (...) values at rollout and GAE returns.
        mask: (...) bool, True = counts; None counts all.
        clip: range of the value's move, at least 0; None for the plain squared error.
        denominator, backend: as in `ppo_loss`.

    Returns:
        ValueLoss (fp32, fp64 for fp64 input).

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("values", values)
    checks.per_token("old_values", old_values, "values", values)
    checks.per_token("returns", returns, "values", values)
    checks.boolean("mask", mask, "values", values)
    if clip is not None:
        checks.number("clip", clip, at_least=0)
    tensors = old_values.detach(), returns.detach(), mask
    denominator = checks.denominator(denominator, values.device)
    backend = resolve(backend, values)
    if backend == "reference":
        return ValueLoss(*reference.value_loss(values, *tensors, clip, denominator))
    op, numbers = kernels(backend).value_loss, scalars(clip)
    return ValueLoss(*_ScalarLoss.apply(op, values, *tensors, denominator, numbers))
