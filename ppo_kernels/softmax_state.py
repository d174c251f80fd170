"""Mergeable states of softmaxes over slices of a row, in PyTorch: the dialect of
csrc/softmax_state.h for slices on several ranks; formulas in ppo_kernels/vocab_parallel.py.

A state is a tensor (..., 4) of shift, Σ 2^t, Σ 2^t t and t ln 2 of the token, which may have a t
beyond the dtype's range; that of two softmaxes (..., 5) of shift, Σ 2^t, shift_ref, Σ 2^t_ref and
Σ 2^t (t - t_ref). The shift of a slice with nothing of probability is -inf.
"""

import torch

from ppo_kernels.schemas import result_dtype

LN_2 = 0.6931471805599453
# Of a token on ranks that have it not; others are at most 0, or little above.
_ELSEWHERE = torch.inf


def of_nothing(logits):
    """State of a slice of no elements."""
    return _constant(logits, (-torch.inf, 0.0, 0.0, _ELSEWHERE))


def joint_of_nothing(logits):
    return _constant(logits, (-torch.inf, 0.0, -torch.inf, 0.0, 0.0))


def _constant(logits, state):
    state = torch.stack([logits.new_full((), x, dtype=result_dtype(logits)) for x in state])
    return state.expand(*logits.shape[:-1], -1)


def from_kernel(logprobs, entropy, stats, here):
    """State from what a kernel gives of a slice; `here` (...): the token is in it."""
    nothing, shift, log2_sum, total = _of_stats(stats)
    weighted = torch.where(nothing, 0.0, total * (log2_sum - entropy / LN_2))
    of_token = torch.where(nothing, -torch.inf, logprobs + LN_2 * log2_sum)
    return torch.stack((shift, total, weighted, torch.where(here, of_token, _ELSEWHERE)), -1)


def joint_from_kernel(kl, stats, ref_stats):
    nothing, shift, log2_sum, total = _of_stats(stats)
    ref_nothing, ref_shift, ref_log2_sum, ref_total = _of_stats(ref_stats)
    cross = total * (kl / LN_2 + log2_sum - ref_log2_sum)
    # The reference excludes all of this slice, and so what p allows in it.
    cross = torch.where(ref_nothing & ~total.isnan(), torch.inf, cross)
    cross = torch.where(nothing & ~ref_total.isnan(), 0.0, cross)
    return torch.stack((shift, total, ref_shift, ref_total, cross), -1)


def _of_stats(stats):
    """(nothing, shift, log2 Σ 2^t, Σ 2^t) from a kernel's `softmax_stats`."""
    shift, log2_sum = stats.unbind(-1)
    nothing = log2_sum == -torch.inf
    shift = torch.where(nothing, -torch.inf, shift)
    return nothing, shift, log2_sum, log2_sum.exp2()


def plain(logits, ids, here, temperature):
    """State of a slice by PyTorch alone."""
    log_powers, shift = _log_powers(logits, temperature)
    t = log_powers / LN_2
    powers = t.exp2()
    weighted = (powers * t.masked_fill(t == -torch.inf, 0.0)).sum(-1)
    of_token = log_powers.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)
    of_token = torch.where(here, of_token, _ELSEWHERE)
    return torch.stack((shift, powers.sum(-1), weighted, of_token), -1).to(result_dtype(logits))


def joint_plain(logits, ref_logits, temperature):
    t, shift = _log_powers(logits, temperature)
    t_ref, ref_shift = _log_powers(ref_logits, temperature)
    t, t_ref = t / LN_2, t_ref / LN_2
    powers, ref_powers = t.exp2(), t_ref.exp2()
    cross = (powers * (t - t_ref).masked_fill(powers == 0, 0.0)).sum(-1)
    state = (shift, powers.sum(-1), ref_shift, ref_powers.sum(-1), cross)
    return torch.stack(state, -1).to(result_dtype(logits))


def _log_powers(logits, temperature):
    """t ln 2 (..., V + 1) and the shift (...) in fp64."""
    # An excluded token more: a slice may have none.
    z = torch.nn.functional.pad(logits.double(), (0, 1), value=-torch.inf)
    shift = z.amax(-1)
    return _relative(z, torch.where(shift == -torch.inf, 0.0, shift), temperature), shift


def _relative(logits, shift, temperature):
    """t ln 2 of logits (..., V), in fp64."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double().unsqueeze(-1)
    return (logits.double() - shift.double().unsqueeze(-1)) / temperature


def gradient(grad_logprobs, grad_entropy, logits, ids, entropy, stats, temperature):
    """The gradient in a slice, from the statistics of its rows; ids outside of it are nobody's."""
    log_p = _log_p(logits, stats, temperature)
    p, zero = log_p.exp(), entropy.new_zeros((), dtype=torch.float64)
    g, h = (zero if x is None else x.double().unsqueeze(-1) for x in (grad_logprobs, grad_entropy))
    of_token = torch.arange(logits.shape[-1], device=logits.device) == ids.unsqueeze(-1)
    centred = (log_p + entropy.double().unsqueeze(-1)).masked_fill(p == 0, 0.0)
    grad = g * (of_token.double() - p) - h * p * centred
    return _over_temperature(torch.where((g == 0) & (h == 0), 0.0, grad), logits, temperature)


def joint_gradient(grad_kl, logits, ref_logits, kl, stats, ref_stats, temperature):
    log_p, log_q = _log_p(logits, stats, temperature), _log_p(ref_logits, ref_stats, temperature)
    p, g = log_p.exp(), grad_kl.double().unsqueeze(-1)
    centred = (log_p - log_q - kl.double().unsqueeze(-1)).masked_fill(p == 0, 0.0)
    return _over_temperature(torch.where(g == 0, 0.0, g * p * centred), logits, temperature)


def _log_p(logits, stats, temperature):
    shift, log2_sum = stats.double().unbind(-1)
    return _relative(logits, shift, temperature) - LN_2 * log2_sum.unsqueeze(-1)


def _over_temperature(grad, logits, temperature):
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double().unsqueeze(-1)
    return torch.where(grad == 0, 0.0, grad / temperature).to(logits.dtype)


def merged(states, temperature):
    """(logprobs, entropy, stats, owners) of rows from states (ranks, ..., 4); `owners` counts the
    ranks that have the token, and the log-prob is NaN unless it is one."""
    shift, total, weighted, of_token = states.unbind(-1)
    top, log_change = _log_changes(shift, temperature)
    change = log_change / LN_2
    weighted = _in_order(_weighed(change, weighted + change * total))
    total = _in_order(change.exp2() * total)
    here = of_token != _ELSEWHERE
    owners = here.sum(0)
    of_token = _in_order(torch.where(here, of_token + log_change, 0.0))
    log2_sum = total.log2()
    logprobs = (of_token - LN_2 * log2_sum).clamp(max=0.0)
    logprobs = torch.where(owners == 1, logprobs, torch.nan)
    entropy = (LN_2 * (log2_sum - weighted / total)).clamp(min=0.0)
    return logprobs, entropy, torch.stack((top, log2_sum), -1), owners


def joint_merged(states, temperature):
    """(kl, stats, ref_stats) of rows from states (ranks, ..., 5)."""
    shift, total, ref_shift, ref_total, cross = states.unbind(-1)
    top, change = _log_changes(shift, temperature)
    ref_top, ref_change = _log_changes(ref_shift, temperature)
    change, ref_change = change / LN_2, ref_change / LN_2
    cross = _in_order(_weighed(change, cross + (change - ref_change) * total))
    total = _in_order(change.exp2() * total)
    ref_total = _in_order(ref_change.exp2() * ref_total)
    log2_sum, ref_log2_sum = total.log2(), ref_total.log2()
    kl = (LN_2 * (cross / total - log2_sum + ref_log2_sum)).clamp(min=0.0)
    return kl, torch.stack((top, log2_sum), -1), torch.stack((ref_top, ref_log2_sum), -1)


def _log_changes(shift, temperature):
    """The largest of shifts (ranks, ...), and (shift - largest) / τ of each; 0 for -inf."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(shift.dtype)
    top = shift.amax(0)
    return top, torch.where(shift == -torch.inf, 0.0, (shift - top) / temperature)


def _weighed(change, x):
    """2^change x, and 0 for a power of 0, though x may have overflowed."""
    power = change.exp2()
    return torch.where(power == 0, 0.0, power * x)


def _in_order(terms):
    """Their sum in the order of ranks; that of `terms.sum(0)` may depend on the batch's shape."""
    return sum(terms.unbind())
