r"""Log-probabilities over what a sampler kept: top-k, top-p, min-p and the like.

A sampler that keeps the ids S of a row draws from the softmax over S alone. For a row of logits z,
its temperature τ and p_j = exp(z_j / τ) / Σ_{i ∈ S} exp(z_i / τ) for j ∈ S, 0 elsewhere::

    logprob(a) = z_a / τ - log Σ_{j ∈ S} exp(z_j / τ)      ∂logprob/∂z_j = (1[j = a] - p_j) / τ
    H          = - Σ_{j ∈ S} p_j log p_j                   ∂H/∂z_j       = -p_j (log p_j + H) / τ

With the sampler's own S a policy that has not moved has ratio 1, which the softmax over the whole
vocabulary does not give. Only kept logits are read, and the gradient is theirs among zeros: plain
PyTorch on K numbers; where a device has no segmented sums (not CPU, CUDA or ROCm), on all of them.
"""

import torch
from torch import Tensor

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import under_transforms
from ppo_kernels.logprobs import LogprobsAndEntropy
from ppo_kernels.schemas import result_dtype

# Device types with `torch.segment_reduce`, and with the fp64 that its sums are taken in.
_SEGMENTED = ("cpu", "cuda")


def _places(x, rows, ids):
    """The index of elements (row, id) of a tensor (..., V), whatever its strides."""
    index = [ids]
    for size in reversed(x.shape[:-1]):
        index.insert(0, rows % size)
        rows = rows // size
    return tuple(index)


class _KeptLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, tokens, ids, offsets, mask, temperatures):
        ctx.set_materialize_grads(False)
        dtype, place = result_dtype(logits), torch.arange(ids.numel(), device=ids.device)
        rows = (torch.searchsorted(offsets, place, right=True) - 1).clamp(0, tokens.numel() - 1)
        z = logits[_places(logits, rows, ids)].to(dtype)
        top = torch.segment_reduce(z, "max", offsets=offsets, unsafe=True, initial=-torch.inf)
        tau = temperatures.to(dtype)[rows]
        t = (z - top[rows]) / tau
        e, is_token = t.exp(), ids == tokens[rows]
        # Summed up in fp64 and, as they are columns, each segment in order by one thread: a sum
        # depends on nothing but its segment.
        columns = e, _weighed(e, t), torch.where(is_token, t, 0.0), is_token
        columns = torch.stack([x.double() for x in columns], 1)
        sums = torch.segment_reduce(columns, "sum", offsets=offsets, unsafe=True, initial=0)
        total, weighted, token, found = sums.unbind(1)
        log_total = total.log()
        logprobs = torch.where(found == 1, token - log_total, torch.nan)
        entropy = (log_total - weighted / total).clamp(min=0.0)
        ctx.save_for_backward(
            t - log_total.to(dtype)[rows], is_token, rows, ids, mask, tau, entropy.to(dtype)
        )
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        # Last a new tensor: torch 2.11 compiles a `to` of its own dtype into no gradient.
        return tuple(torch.where(mask, x.to(dtype), 0.0) for x in (logprobs, entropy))

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_logprobs, grad_entropy):
        log_p, is_token, rows, ids, mask, tau, entropy = ctx.saved_tensors
        g, h = (
            torch.where(mask, 0.0 if x is None else x, 0.0)[rows].to(log_p.dtype)
            for x in (grad_logprobs, grad_entropy)
        )
        p = log_p.exp()
        grad = g * (is_token.to(p.dtype) - p) - h * _weighed(p, log_p + entropy[rows])
        grad = torch.where((g == 0) & (h == 0), 0.0, grad / tau)
        grad_logits = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        # Ids are distinct, so each element is written once.
        grad_logits.view(-1)[rows * ctx.shape[-1] + ids] = grad.to(ctx.dtype)
        return grad_logits, None, None, None, None, None


def _weighed(p, x):
    """p x, and 0 where p is, though x may be -inf."""
    return p * torch.where(p == 0, 0.0, x)


def _first(bad):
    return bad.nonzero()[0].tolist()


def _check_values(logits, tokens, kept_ids, kept_offsets, mask):
    """ValueError for what no sampler can have kept, where that waits for no device."""
    if not checks.value_checks_run(kept_offsets):
        return
    vocabulary, (shape, count) = logits.shape[-1], (tokens.shape, kept_ids.numel())
    lengths = kept_offsets.diff()
    if kept_offsets[0] != 0 or kept_offsets[-1] != count or (lengths < 0).any():
        raise ValueError(
            f"kept_offsets must rise from 0 to {count}, the length of kept_ids, got {kept_offsets}"
        )
    bad = (kept_ids < 0) | (kept_ids >= vocabulary)
    if bad.any():
        (where,) = _first(bad)
        raise ValueError(
            f"kept_ids must be in [0, {vocabulary}), got {kept_ids[where]} at [{where}]"
        )
    rows = torch.arange(tokens.numel(), device="cpu").repeat_interleave(lengths)
    keys = (rows * vocabulary + kept_ids).sort().values
    repeated = keys[1:] == keys[:-1]
    if repeated.any():
        row, token = divmod(keys[1:][repeated][0].item(), vocabulary)
        raise ValueError(f"kept_ids must not repeat in a row, got {token} twice in row {row}")
    bad = mask & (lengths == 0).view(shape)
    if bad.any():
        raise ValueError(
            f"kept_ids must have one of each row that counts, got none at {_first(bad)}"
        )
    found = torch.zeros(tokens.numel(), dtype=torch.bool, device="cpu")
    found[rows[kept_ids == tokens.reshape(-1)[rows]]] = True
    bad = mask & ~found.view(shape)
    if bad.any():
        where = _first(bad)
        raise ValueError(
            f"tokens must be among the ids that their rows keep, got {tokens[tuple(where)]} at "
            f"{where}"
        )


def kept_token_logprobs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
) -> LogprobsAndEntropy:
    """`token_logprobs_and_entropy` over the ids that a sampler kept, see `ppo_kernels.kept`.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64, before the sampler's filter; N rows.
        tokens: (...) int64 or int32 ids, each among those kept of its row.
        kept_ids: (K,) int64 or int32, row by row, in any order but without repetition.
        kept_offsets: (N + 1,) int64 or int32: row i, in the order of `tokens.flatten()`, keeps
            `kept_ids[kept_offsets[i] : kept_offsets[i + 1]]`. `kept_from_mask` makes both.
        mask: (...) bool, True = counts; None counts all. Only rows that do not count may keep
            nothing; their tokens and temperatures are not looked at.
        temperature: > 0, a number or (...) one per token, of which no gradient is taken.

    Returns:
        LogprobsAndEntropy: `logprobs` (...) and `entropy` (...) in nats, fp32 (fp64 for fp64
        logits), 0 where masked out. Both are differentiable in `logits`, with gradient 0 for all
        that is not kept.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range, naming it. What
            tensors hold is looked at on the CPU only: offsets that do not rise from 0 to K, ids out
            of range or repeated in a row, a row that keeps nothing, a token that is not kept, a
            temperature that is not finite and > 0. On a GPU such a token, or one kept twice, gives
            NaN, and an id out of range is PyTorch's device-side assertion.
    """
    tokens = checks.logits_and_tokens(logits, tokens)
    kept_ids = checks.integer("kept_ids", kept_ids)
    checks.same("kept_ids", kept_ids, "its own count", (kept_ids.numel(),), logits.device)
    kept_offsets = checks.integer("kept_offsets", kept_offsets)
    shape = (tokens.numel() + 1,)
    checks.same("kept_offsets", kept_offsets, "the rows of logits", shape, logits.device)
    mask = checks.boolean("mask", mask, "tokens", tokens)
    temperature = checks.temperature(temperature, tokens)
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    _check_values(logits, tokens, kept_ids, kept_offsets, mask)
    if isinstance(temperature, torch.Tensor):
        checks.refuse_temperature(torch.where(mask, temperature, 1.0))
    else:
        # A product: `torch.full` would compile anew for each number.
        temperature = torch.ones_like(tokens, dtype=result_dtype(logits)) * temperature
    if logits.device.type not in _SEGMENTED or under_transforms():
        return LogprobsAndEntropy(
            *reference.kept_token_logprobs_and_entropy(
                logits, tokens, kept_ids, kept_offsets, mask, temperature=temperature
            )
        )
    # On a GPU they may be anything: nothing beyond the tensors is to be read.
    offsets = kept_offsets.long().clamp(0, kept_ids.numel()).cummax(0).values
    flat = (x.reshape(-1) for x in (mask, temperature))
    results = _KeptLogprobs.apply(logits, tokens.reshape(-1), kept_ids.long(), offsets, *flat)
    return LogprobsAndEntropy(*(x.view(tokens.shape) for x in results))


def kept_from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What `kept_token_logprobs_and_entropy` is told of a mask over the vocabulary.

    Of logits that a sampler filtered, `kept_from_mask(filtered > -torch.inf)`. Waits for the
    device, as the number of ids is not known before.

    Args:
        mask: (..., V) bool, True = kept.

    Returns:
        kept_ids (K,), rising within each row, and kept_offsets (N + 1,), both int64.

    Raises:
        TypeError, ValueError: mask is no bool tensor, or has no dimension.
    """
    if mask is None:
        raise TypeError("mask must be a bool tensor (True = kept), got None")
    checks.boolean("mask", mask, "itself", mask)
    checks.vocabulary("mask", mask)
    rows = mask.reshape(-1, mask.shape[-1])
    kept_ids = rows.nonzero(as_tuple=True)[1]
    ends = rows.sum(-1).cumsum(0)
    return kept_ids, torch.cat((ends.new_zeros(1), ends))
