r"""Log-probs, entropy, KL and the PPO loss of logits whose vocabulary is split over processes.

Each rank sweeps its slice of a row; with k = log2(e) / τ and t_j = k (z_j - shift) it has the
state::

    shift    s = Σ_j 2^t_j    w = Σ_j 2^t_j t_j    t_a, where the token a is in its slice

and from the states of all, with S = max_r shift_r and d_r = k (shift_r - S), follow those of the
row::

    s = Σ_r 2^d_r s_r      w = Σ_r 2^d_r (w_r + d_r s_r)      t_a = t_a of its rank + its d
    logprob = ln 2 (t_a - log2 s)      H = ln 2 (log2 s - w / s)

and likewise KL(p || q) = ln 2 (c / s - log2 s + log2 s_ref), with c = Σ_j 2^t_j (t_j - t_ref,j)
and c = Σ_r 2^d_r (c_r + (d_r - d_ref,r) s_r).

A call makes one collective: all ranks get the states of all, four numbers a token and rank (five
for KL), and merge them in rank order, so that results are bitwise the same everywhere. It is a
gather, because states do not merge by a sum: the sums of an all-reduce would have to wait for the
maxima of another. The backward makes none: a rank's slice of the gradient takes nothing but its
logits and the state of the row, see `ppo_kernels.logprobs` and `ppo_kernels.kl`. Every rank must
therefore derive the same loss from the results, as one that all of them compute alike.

The split is that of Megatron-LM's cross entropy (Shoeybi et al., 2019, arXiv:1909.08053), which
takes three all-reduces.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_kernels import checks, schemas, softmax_state
from ppo_kernels.dispatch import (
    kernels,
    resolve,
    scalars,
    temperatures_and_number,
    under_transforms,
)
from ppo_kernels.kl import kl_estimate
from ppo_kernels.logprobs import LogprobsAndEntropy
from ppo_kernels.masked import masked_mean
from ppo_kernels.ppo_loss import PPOLoss, checked_loss
from ppo_kernels.schemas import LossInputs, Objective
from ppo_kernels.token_losses import clipped_policy_loss


def _gathered(state, group):
    """(ranks, ...) from the state (...) of each rank."""
    state = state.contiguous()
    states = [torch.empty_like(state) for _ in range(dist.get_world_size(group))]
    dist.all_gather(states, state, group=group)
    return torch.stack(states)


def _temperature_of(temperatures, numbers):
    return numbers[0] if temperatures is None else temperatures


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, here, mask, group, backend, temperatures, numbers):
        ctx.set_materialize_grads(False)
        temperature = _temperature_of(temperatures, numbers)
        if logits.shape[-1] == 0:
            state = softmax_state.of_nothing(logits)
        elif backend == "reference":
            state = softmax_state.plain(logits, ids, here, temperature)
        else:
            scored = kernels(backend).token_logprobs(logits, ids, mask, temperatures, numbers)
            state = softmax_state.from_kernel(*scored, here)
        states = _gathered(state, group)
        logprobs, entropy, stats, owners = softmax_state.merged(states, temperature)
        ctx.mark_non_differentiable(owners)
        ids = torch.where(here, ids, schemas.ELSEWHERE)
        # A clone: results are the caller's to write to.
        ctx.save_for_backward(logits, ids, entropy.clone(), stats, temperatures, numbers)
        ctx.backend = backend
        return logprobs, entropy, owners

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_logprobs, grad_entropy, _):
        logits, *rest = ctx.saved_tensors
        if logits.numel() == 0 or (grad_logprobs is None and grad_entropy is None):
            grad_logits = torch.zeros_like(logits)
        elif ctx.backend == "reference":
            *known, temperatures, numbers = rest
            temperature = _temperature_of(temperatures, numbers)
            grad_logits = softmax_state.gradient(
                grad_logprobs, grad_entropy, logits, *known, temperature
            )
        else:
            grad_logits = kernels(ctx.backend).token_logprobs_backward(
                grad_logprobs, grad_entropy, logits, *rest
            )
        return grad_logits, *(None,) * (2 + len(rest))


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, group, backend, temperatures, numbers):
        temperature = _temperature_of(temperatures, numbers)
        if logits.shape[-1] == 0:
            state = softmax_state.joint_of_nothing(logits)
        elif backend == "reference":
            state = softmax_state.joint_plain(logits, ref_logits, temperature)
        else:
            compared = kernels(backend).kl_divergence(
                logits, ref_logits, None, temperatures, numbers
            )
            state = softmax_state.joint_from_kernel(*compared)
        states = _gathered(state, group)
        kl, *stats = softmax_state.joint_merged(states, temperature)
        ctx.save_for_backward(logits, ref_logits, kl.clone(), *stats, temperatures, numbers)
        ctx.backend = backend
        return kl

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_kl):
        logits, *rest = ctx.saved_tensors
        if logits.numel() == 0:
            grad_logits = torch.zeros_like(logits)
        elif ctx.backend == "reference":
            *known, temperatures, numbers = rest
            temperature = _temperature_of(temperatures, numbers)
            grad_logits = softmax_state.joint_gradient(grad_kl, logits, *known, temperature)
        else:
            grad_logits = kernels(ctx.backend).kl_divergence_backward(grad_kl, logits, *rest)
        return grad_logits, *(None,) * (len(rest) - 1)


def _temperature(temperature, *like):
    """`checks.temperature` with values looked at here: where a rank has an empty slice no kernel
    would, and the others would wait for it."""
    temperature = checks.temperature(temperature, *like)
    if isinstance(temperature, torch.Tensor):
        checks.refuse_temperature(temperature)
    return temperature


def _token_logprobs(logits, tokens, mask, group, vocab_start, temperature, backend):
    """(logprobs, entropy) of a checked slice; every counted token must have one owner."""
    temperature = _temperature(temperature, tokens)
    backend = resolve(backend, logits)
    ids = tokens - vocab_start
    here = (ids >= 0) & (ids < logits.shape[-1])
    ids = torch.where(here, ids, 0)
    temperatures, number = temperatures_and_number(temperature)
    *scored, owners = _TokenLogprobs.apply(
        logits, ids, here, mask, group, backend, temperatures, scalars(number)
    )
    checks.refuse_unowned(tokens, owners, mask)
    return LogprobsAndEntropy(*scored)


def _slice(logits, group):
    """(this rank's slice, group, id of its first token, None if plain tensors do not tell)."""
    from torch.distributed.tensor import DTensor, Shard

    if under_transforms():
        raise RuntimeError("vocab_parallel_* ops cannot run under torch.func transforms")
    if not isinstance(logits, DTensor):
        return logits, group, None
    if group is not None:
        got = type(group).__name__
        raise ValueError(f"group must be left out with DTensor logits, which tell it, got {got}")
    mesh, dim = logits.device_mesh, logits.ndim - 1
    if logits.placements != (Shard(dim),):
        raise ValueError(
            f"logits must be sharded on the last dimension of a 1-D mesh, (Shard({dim}),), "
            f"got {logits.placements}"
        )
    # DTensor shards as `torch.chunk` cuts.
    longest = -(-logits.shape[-1] // mesh.size())
    start = min(mesh.get_local_rank() * longest, logits.shape[-1])
    return logits.to_local(), mesh.get_group(), start


def _slice_with_start(logits, tokens, group, vocab_start):
    """(slice, tokens, group, start): `_slice` with the start that plain tensors leave to the
    caller, and with checked tokens."""
    logits, group, start = _slice(logits, group)
    if (start is None) == (vocab_start is None):
        rule = "given with plain logits" if start is None else "left out with DTensor logits"
        raise ValueError(f"vocab_start must be {rule}, got {vocab_start}")
    if start is None:
        start = checks.whole_number("vocab_start", vocab_start, at_least=0)
    _check_slice(logits)
    tokens = checks.integer("tokens", tokens)
    shape = logits.shape[:-1]
    checks.same("tokens", tokens, "logits without its last dimension", shape, logits.device)
    return logits, tokens, group, start


def _check_slice(logits):
    checks.floating("logits", logits)
    if logits.ndim == 0:
        raise ValueError("logits must have shape (..., V_local), got ()")


def vocab_parallel_token_logprobs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    temperature: float | Tensor = 1.0,
    backend: str = "auto",
) -> LogprobsAndEntropy:
    """`token_logprobs_and_entropy` of rows whose vocabulary is split over a process group.

    All ranks call it with the same arguments but for their slice of the logits; where an argument
    is wrong on one rank alone, that one raises and the others wait for it. Slices may be of any
    lengths, 0 included, and must not overlap. Formulas in `ppo_kernels.vocab_parallel`.

    Args:
        logits: (..., V_local) this rank's slice, fp32, bf16, fp16 or fp64; rows may be strided. Or
            a DTensor (..., V) sharded on its last dimension over a 1-D mesh, such as
            `hidden @ weight.T` with a weight of Shard(0); its gradient is such a DTensor.
        tokens: (...) int64 or int32 ids in [0, V) of the whole vocabulary.
        group: the process group; None for the default one, or the mesh of a DTensor.
        vocab_start: id of the first token of this rank's slice; to be left out with a DTensor.
        temperature: > 0, a number or (...) one per token, of which no gradient is taken.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        LogprobsAndEntropy, both (...) fp32 (fp64 for fp64 logits), bitwise the same on all ranks,
        differentiable once in this rank's slice, by a loss that all ranks compute alike.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range; on the CPU also,
            on all ranks, a token that no rank has, or more than one. On a GPU its log-probability
            is NaN, see `check_logprobs`.
    """
    logits, tokens, group, start = _slice_with_start(logits, tokens, group, vocab_start)
    return _token_logprobs(logits, tokens, None, group, start, temperature, backend)


def vocab_parallel_kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
    temperature: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`kl_divergence` of rows whose vocabulary is split over a process group.

    Args:
        logits: (..., V_local) or a DTensor, as in `vocab_parallel_token_logprobs_and_entropy`.
        ref_logits: likewise, the same slice; a constant.
        group, temperature, backend: as there.

    Returns:
        (...) in nats, fp32 (fp64 for fp64 logits), bitwise the same on all ranks, differentiable
        once in this rank's slice of `logits`, by a loss that all ranks compute alike.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    ref_logits, *_ = _slice(ref_logits, group)
    logits, group, _ = _slice(logits, group)
    _check_slice(logits)
    checks.per_token("ref_logits", ref_logits, "logits", logits)
    if ref_logits.dtype != logits.dtype:
        raise TypeError(
            f"ref_logits must have dtype {logits.dtype} like logits, got {ref_logits.dtype}"
        )
    temperature = _temperature(
        temperature, logits.new_empty(logits.shape[:-1]), "logits without its last dimension"
    )
    backend, ref_logits = resolve(backend, logits), checks.constant(ref_logits.detach())
    temperatures, number = temperatures_and_number(temperature)
    numbers = temperatures, scalars(number)
    return _KLDivergence.apply(logits, ref_logits, group, backend, *numbers)


def vocab_parallel_ppo_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
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
    """`ppo_loss` of rows whose vocabulary is split over a process group.

    The clipped loss is made of the log-probs and entropies of whole rows, on each rank alike.

    Args:
        logits, tokens, group, vocab_start, temperature, backend: as in
            `vocab_parallel_token_logprobs_and_entropy`; ids in [0, V) where they count.
        all others: as in `ppo_loss`.

    Returns:
        PPOLoss as of `ppo_loss`, bitwise the same on all ranks; `loss` is differentiable once in
        this rank's slice.

    Raises:
        TypeError, ValueError: as `ppo_loss`, on all ranks.
    """
    logits, tokens, group, start = _slice_with_start(logits, tokens, group, vocab_start)
    inputs, objective = checked_loss(
        LossInputs(tokens, old_logprobs, advantages, mask, ref_logprobs, denominator, temperature),
        Objective(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator),
        importance_weights,
    )
    _, old_logprobs, advantages, mask, ref_logprobs, denominator, _ = inputs
    checks.refuse_infinite(
        mask, old_logprobs=old_logprobs, advantages=advantages, ref_logprobs=ref_logprobs
    )
    if mask is not None and isinstance(temperature, torch.Tensor):
        temperature = temperature.masked_fill(~mask, 1.0)
    logprobs, token_entropy = _token_logprobs(
        logits, tokens, mask, group, start, temperature, backend
    )
    if mask is not None:
        logprobs, token_entropy = (x.masked_fill(~mask, 0.0) for x in (logprobs, token_entropy))
    checks.refuse_impossible(logprobs, tokens)
    # Where nothing raises, on a GPU, the loss says it.
    finite = torch.where(logprobs.isfinite(), logprobs, torch.nan)
    policy = clipped_policy_loss(
        finite,
        old_logprobs,
        advantages,
        mask,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        denominator=denominator,
        backend=backend,
    )
    entropy = masked_mean(token_entropy, mask, denominator, backend=backend)
    if ref_logprobs is None:
        kl = torch.zeros_like(entropy)
    else:
        kl = kl_estimate(finite, ref_logprobs, estimator=kl_estimator, backend=backend)
        kl = masked_mean(kl, mask, denominator, backend=backend)
    loss = policy.loss - objective.entropy_coef * entropy + objective.kl_coef * kl
    policy_loss, *of_clipping = policy
    rest = (policy_loss, entropy, kl, *of_clipping, logprobs, token_entropy)
    results = loss, *(x.detach() for x in rest)
    others = logits, old_logprobs, advantages, ref_logprobs
    return PPOLoss(*(schemas.promoted(x, *others) for x in results))
