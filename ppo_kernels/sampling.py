"""Tokens drawn from logits with one number in [0, 1) each."""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import kernels, resolve, scalars, temperatures_and_number


class SampledTokens(NamedTuple):
    """`tokens` int64 and `logprobs` fp32 (fp64 for fp64 logits), both (...) and detached."""

    tokens: Tensor
    logprobs: Tensor


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> SampledTokens:
    r"""Tokens of the filtered softmax, where its cumulative distribution passes the row's number.

    For a row of logits z (V,), temperature τ, a number u and the ids S that the filters keep::

        s_j      = z_j / τ
        p_j      = exp(s_j) / Σ_{i ∈ S} exp(s_i)     for j ∈ S, else 0
        token    = min {a : Σ_{j <= a} p_j > u}
        logprob  = log p_token                       nats, over what was kept

    A token is a function of its own logits and number alone: bitwise the same in any batch, at any
    place and with any number of threads. Backends agree unless u is within their rounding of a sum
    (some 1e-6). Logits of -inf are never drawn. Temperature 0 is greedy: the lowest of the ids with
    the largest logit, with logprob 0, whatever the filters.

    Filters keep what those of transformers keep, in its order, ties included, and one id at least:

    1. `top_k`: the ids whose s is not below the k-th largest (`TopKLogitsWarper`);
    2. `top_p`: of the ids sorted by rising s, those of equal s by rising id, all whose cumulative
       probability is above 1 - top_p, and the last (`TopPLogitsWarper`; 1 keeps all);
    3. `min_p`: the ids that are at least min_p times as likely as the likeliest
       (`MinPLogitsWarper`).

    The logits are read once and a small part of them again; with top_k or top_p also some 8 to 11
    times to find where they cut (twice as often in fp64), mostly from cache. Nothing of the
    vocabulary's size is written, and no gradient is taken.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64; rows may be strided, V must not.
        uniforms: (...) fp32 or fp64 in [0, 1).
        temperature: >= 0, a number or a floating tensor (...) with one for each row.
        top_k: a whole number >= 1, or None for no such filter.
        top_p: in [0, 1], or None.
        min_p: in [0, 1], or None.
        mask: (...) bool, True = draw; None draws all. Other rows are not read; they get token 0 and
            logprob 0.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        SampledTokens.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range; the message names
            it. What tensors hold is looked at on the CPU only: a row that has no distribution
            because all its logits are -inf or one is NaN or +inf (or gets there divided by the
            temperature), a number outside [0, 1), a temperature that is not finite and >= 0. On a
            GPU such a row gets token V, which is no id, and logprob NaN.
    """
    checks.floating("logits", logits)
    checks.vocabulary("logits", logits)
    checks.floating("uniforms", uniforms)
    if uniforms.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"uniforms must be float32 or float64, got {uniforms.dtype}")
    like = "logits without its last dimension"
    checks.same("uniforms", uniforms, like, logits.shape[:-1], logits.device)
    mask = checks.boolean("mask", mask, "uniforms", uniforms)
    temperature = checks.temperature(temperature, uniforms, "uniforms", at_least=0)
    if top_k is not None:
        top_k = checks.whole_number("top_k", top_k, at_least=1)
    if top_p is not None:
        top_p = checks.number("top_p", top_p, at_least=0, at_most=1)
    if min_p is not None:
        min_p = checks.number("min_p", min_p, at_least=0, at_most=1)
    backend = resolve(backend, logits)
    logits, uniforms = logits.detach(), uniforms.detach()
    if backend == "reference":
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        return SampledTokens(*reference.sample_tokens(logits, uniforms, mask, **options))
    temperatures, number = temperatures_and_number(temperature)
    numbers = scalars(
        number, top_k, 1.0 if top_p is None else top_p, 0.0 if min_p is None else min_p
    )
    return SampledTokens(
        *kernels(backend).sample_tokens(logits, uniforms, mask, temperatures, numbers)
    )
