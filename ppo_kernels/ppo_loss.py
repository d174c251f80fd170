r"""The clipped PPO loss from logits; the formula stands at `ppo_loss`.

The loss reaches the logits through two numbers per token, g = ∂loss/∂logprob and h = ∂loss/∂H, so
that (see `ppo_kernels.logprobs`)::

    ∂loss/∂z_j = (g (1[j = a] - p_j) - h p_j (log p_j + H)) / τ
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import (
    denominator_on,
    is_differentiable,
    kernels,
    resolve,
    scalars,
    temperatures_and_number,
    under_transforms,
)
from ppo_kernels.reference import chained
from ppo_kernels.schemas import LossInputs, Objective, any_fp64


class PPOLoss(NamedTuple):
    """What `ppo_loss` gives. All but `loss` are detached; scalars are means over the denominator.

    `entropy` is the full-vocabulary entropy, `kl` the chosen estimate against the reference (0
    without one), `approx_kl` the k3 estimate of KL(old || new), `clip_fraction` the share of tokens
    where clipping acts; `logprobs` and `token_entropy` (...) are 0 where masked out.
    """

    loss: Tensor
    policy_loss: Tensor
    entropy: Tensor
    kl: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    logprobs: Tensor
    token_entropy: Tensor


def for_kernel(inputs: LossInputs, objective: Objective) -> tuple:
    """LossInputs and Objective -> what the registered ops take after the logits."""
    *tensors, denominator, temperature = inputs
    temperatures, temperature = temperatures_and_number(temperature)
    *numbers, kl_estimator = objective
    denominator = denominator_on(inputs.tokens.device, denominator)
    estimator = reference.ESTIMATORS.index(kl_estimator)
    return *tensors, denominator, temperatures, scalars(temperature, *numbers), estimator


class _PPOLoss(torch.autograd.Function):
    """The forward reads the logits once, the backward once more to write their gradient."""

    @staticmethod
    def forward(ctx, backend, logits, tokens, *rest):
        *results, stats, grad_logprobs, grad_token_entropy = kernels(backend).ppo_loss(
            logits, tokens, *rest
        )
        *_, temperatures, numbers, _ = rest
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(
            *(grad_logprobs, grad_token_entropy, logits, tokens),
            # A clone: results are the caller's to write to.
            *(results[-1].clone(), stats, temperatures, numbers),
        )
        ctx.backend, ctx.rest = backend, len(rest)
        return tuple(results)

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_loss, *_):
        grad_logprobs, grad_token_entropy, *saved = ctx.saved_tensors
        grad_logits = kernels(ctx.backend).token_logprobs_backward(
            chained(grad_loss, grad_logprobs), chained(grad_loss, grad_token_entropy), *saved
        )
        return None, grad_logits, None, *(None,) * ctx.rest


class _PPOLossAndGradient(torch.autograd.Function):
    """The forward makes the gradient, while the logits are at hand, and the backward hands it on;
    another backward makes it again."""

    @staticmethod
    def forward(ctx, backend, logits, *arguments):
        *results, grad = kernels(backend).ppo_loss_and_gradient(logits, *arguments)
        # In a list: compiled autograd calls the backward with a copy of `ctx`.
        ctx.held = [grad]
        *tensors, kl_estimator = arguments
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(logits, *tensors)
        ctx.backend, ctx.kl_estimator = backend, kl_estimator
        return tuple(results)

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_loss, *_):
        try:
            grad = ctx.held.pop()
        except IndexError:
            arguments = *ctx.saved_tensors, ctx.kl_estimator
            *_, grad = kernels(ctx.backend).ppo_loss_and_gradient(*arguments)
        # A batch of upstream gradients, of `torch.autograd.grad(..., is_grads_batched=True)`.
        if torch._C._functorch.is_legacy_batchedtensor(grad_loss):
            grad = chained(grad_loss, grad).to(grad.dtype)
        else:
            kernels(ctx.backend).rescale_(grad, grad_loss)
        return None, grad, *(None,) * len(ctx.needs_input_grad[2:])


def _is_written_by_backward(backend, logits):
    """fp16 does not hold a gradient that a loss scale is yet to multiply."""
    half = backend != "reference" and logits.dtype == torch.float16
    return half and is_differentiable(logits)


class _PPOLossInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, later, logits, *arguments):
        saved = ()
        if backend == "reference":
            results, *saved = reference.ppo_loss_(logits, *arguments)
            if not ctx.needs_input_grad[2]:
                checks.refuse_underflow(*saved, logits.dtype)
        elif later:
            tokens, *_, temperatures, numbers, _ = arguments
            *results, stats, g, h = kernels(backend).ppo_loss(logits, *arguments)
            saved = g, h, tokens, results[-1].clone(), stats, temperatures, numbers
            torch.autograd.graph.increment_version(logits)
        else:
            results = kernels(backend).ppo_loss_(logits, *arguments)
            torch.autograd.graph.increment_version(logits)
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(logits.detach(), *saved)
        ctx.backend, ctx.later, ctx.spent = backend, later, False
        ctx.arguments = len(arguments)
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
        logits, *saved = ctx.saved_tensors
        if ctx.backend == "reference":
            (grad,) = saved
            logits.copy_(chained(grad_loss, grad))
        elif ctx.later:
            g, h, *known = saved
            kernels(ctx.backend).token_logprobs_backward_(
                chained(grad_loss, g), chained(grad_loss, h), logits, *known
            )
        else:
            kernels(ctx.backend).rescale_(logits, grad_loss)
        return None, None, logits, *(None,) * ctx.arguments


def checked_loss(
    inputs: LossInputs, objective: Objective, importance_weights: Tensor | None
) -> tuple[LossInputs, Objective]:
    """(LossInputs, Objective), the tokens checked already -> the same checked, with the importance
    weights in the advantages."""
    tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, temperature = inputs
    checks.per_token("old_logprobs", old_logprobs, "tokens", tokens)
    mask = checks.boolean("mask", mask, "tokens", tokens)
    advantages = checks.advantages(advantages, importance_weights, mask, "tokens", tokens)
    clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator = objective
    clip_low, clip_high, dual_clip = checks.clip_range(clip_low, clip_high, dual_clip)
    entropy_coef = checks.number("entropy_coef", entropy_coef, at_least=0)
    kl_coef = checks.number("kl_coef", kl_coef, at_least=0)
    checks.choice("kl_estimator", kl_estimator, reference.ESTIMATORS)
    if ref_logprobs is not None:
        checks.per_token("ref_logprobs", ref_logprobs, "tokens", tokens)
        ref_logprobs = checks.constant(ref_logprobs.detach())
    elif kl_coef > 0:
        raise ValueError(f"ref_logprobs must be given when kl_coef > 0, got kl_coef={kl_coef}")
    old_logprobs = checks.constant(old_logprobs.detach())
    temperature = checks.temperature(temperature, tokens)
    denominator = checks.denominator(denominator, tokens.device)
    return (
        LossInputs(tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, temperature),
        Objective(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator),
    )


def promoted_loss(results: Iterable[Tensor], logits: Tensor, inputs: LossInputs) -> PPOLoss:
    """PPOLoss in fp64 where logits, log-probs or advantages are."""
    others = inputs.old_logprobs, inputs.advantages, inputs.ref_logprobs
    if logits.dtype != torch.float64 and any_fp64(*others):
        results = (x.double() for x in results)
    return PPOLoss(*results)


def _out_of_place(backend, logits, inputs, objective):
    if backend == "reference":
        results = reference.ppo_loss(logits, inputs, objective)
        return promoted_loss(results, logits, inputs)
    given = for_kernel(inputs, objective)
    if not is_differentiable(logits):
        results = kernels(backend).ppo_loss(logits, *given)[: len(PPOLoss._fields)]
    # Under hooks a forward may be for its results alone, and be run again; a backward that is
    # compiled or captured in a graph knows not whether it is the first.
    elif (
        _is_written_by_backward(backend, logits)
        or torch.compiler.is_compiling()
        or _saved_tensors_go_to_hooks()
        or (logits.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        results = _PPOLoss.apply(backend, logits, *given)
    else:
        results = _PPOLossAndGradient.apply(backend, logits, *given)
    return promoted_loss(results, logits, inputs)


def _saved_tensors_go_to_hooks():
    """True where hooks stand between autograd and what it saves: then no version is compared."""
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    except (AttributeError, TypeError):  # It is private; what is public takes ten times as long.
        try:
            with disable_saved_tensors_hooks("asked only whether there are any"):
                return False
        except RuntimeError:
            return True


def ppo_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_estimator: str = "k3",
    temperature: float | Tensor = 1.0,
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> PPOLoss:
    """The clipped PPO loss (Schulman et al., 2017, arXiv:1707.06347) of tokens, from logits.

    Where the logits need a gradient it is made in the same pass, in a tensor of its own that the
    graph holds until the backward, which scales it if the upstream gradient is not 1: `denominator`
    spares that. In fp16, under saved-tensor hooks (checkpoint), `torch.compile` and CUDA graphs the
    backward makes it.

    Per counted token, with r = exp(logprob - old_logprob), advantage A and entropy H::

        policy = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
                 and, with dual_clip c, at most -A c where A < 0 (Ye et al., 2020, arXiv:1912.09729)
        loss   = policy - entropy_coef H + kl_coef kl(logprob, ref_logprob)

    summed over the mask and divided by `denominator`; kl is `kl_estimate`. log r is bounded at ±80,
    beyond which the gradient is 0, and at ties nothing is clipped.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64; rows may be strided, V must not.
        tokens: (...) int64 or int32 ids, in [0, V) where they count.
        old_logprobs: (...) log-probs of the policy that sampled, in nats.
        advantages: (...) one per token, or one per sequence, without the last dimension.
        mask: (...) bool, True = counts; None counts all. Other rows are not read.
        importance_weights: (...) or one per sequence, at least 0: factors of the policy term alone,
            as for tokens that another engine sampled. A weight of 0 leaves the count as it is.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; clip_high may be
            inf.
        dual_clip: bound c > 1 on the loss where the advantage is negative; None or inf for none.
        entropy_coef, kl_coef: at least 0.
        ref_logprobs: (...) log-probs of the reference; needed when kl_coef > 0.
        kl_estimator: "k1", "k2", "k3" or "abs", as in `kl_estimate`.
        temperature: > 0, divides the logits: a number or (...) one per token, of which no gradient
            is taken; not looked at where the mask is False.
        denominator: number or one-element tensor, the count to divide by (for gradient
            accumulation or data parallelism the global one); default the mask's sum. 0 counts as 1.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        PPOLoss; `loss` is differentiable in `logits`, with gradient 0 in rows that do not count.
        All are fp32, or fp64 where logits, log-probs or advantages are; what is summed over the
        vocabulary is as exact as the dtype of `logits` makes it.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range; on the CPU also a
            counted token whose log-probability, old or reference log-probability or advantage is
            not finite, or whose temperature is not finite and > 0. The message names it. On a GPU
            `loss` is NaN then; see `check_logprobs`.
    """
    tokens = checks.logits_and_tokens(logits, tokens)
    arguments = checked_loss(
        LossInputs(tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, temperature),
        Objective(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator),
        importance_weights,
    )
    return _out_of_place(resolve(backend, logits), logits, *arguments)


def ppo_loss_(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_estimator: str = "k3",
    temperature: float | Tensor = 1.0,
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> PPOLoss:
    """`ppo_loss` that leaves ∂loss/∂logits in the storage of `logits`: two sweeps, no copy.

    The logits are gone afterwards, whether or not they require grad (and also when a counted token
    of log-probability -inf raises). Their version counter moves, so a graph that still needs them
    raises. `loss.backward()` hands the stored gradient on, scaled by the upstream gradient; it can
    be called once. In fp16 under autograd that gradient is written by the backward, not before,
    because it may be a loss scale that makes it representable; without autograd a gradient that
    fp16 has no digits for, as under a large denominator, raises ValueError on the CPU. A leaf's
    `.grad` then shares the leaf's storage. Parts of one tensor share its version: differentiate the
    loss of one before the call on another.

    Under saved-tensor hooks (`checkpoint(use_reentrant=False)`, `save_on_cpu`) versions are not
    compared, and what else saved the logits would silently take the gradient for them: there this
    is `ppo_loss`, with the gradient in a tensor of its own, and RuntimeError where no autograd
    carries it. Hooks that ended before the call are not seen; save_on_cpu keeps CPU tensors as
    they are, so call it within, too.

    Arguments, results and errors are otherwise those of `ppo_loss`; rows of `logits` must not
    overlap and the vocabulary must have stride 1 (ValueError).
    """
    tokens = checks.logits_and_tokens(logits, tokens)
    arguments = checked_loss(
        LossInputs(tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, temperature),
        Objective(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator),
        importance_weights,
    )
    checks.writable("logits", logits)
    if under_transforms():
        raise RuntimeError("ppo_loss_ cannot run under torch.func transforms: use ppo_loss")
    backend = resolve(backend, logits)
    if not torch.compiler.is_compiling() and _saved_tensors_go_to_hooks():
        if not is_differentiable(logits):
            raise RuntimeError(
                "ppo_loss_ cannot leave the gradient in the logits under saved-tensor hooks "
                "(checkpoint, save_on_cpu), which may hold the logits themselves, and these take "
                "no gradient otherwise: use ppo_loss, on logits that require grad"
            )
        return _out_of_place(backend, logits, *arguments)
    given = arguments if backend == "reference" else for_kernel(*arguments)
    later = _is_written_by_backward(backend, logits)
    results = _PPOLossInPlace.apply(backend, later, logits, *given)
    return promoted_loss(results, logits, arguments[0])
