"""Op name -> (schema, fake): the only place where either is written.

`softmax_stats` (..., 2) is private to a backend: what its backward needs to know of a row besides
the logits. `scalars` holds the numbers of a call, see `dispatch.scalars`; `temperatures`,
one per token, stand in for the number among them. Estimators are passed as
indices into `reference.ESTIMATORS`, because a string that crosses the stable ABI is never freed.
Per-token results are fp32, or fp64 for fp64 inputs.

To `token_logprobs_backward` the id ELSEWHERE says that the row's token lies in a part of the
vocabulary that another rank has: the row gets the gradient of its probabilities and no 1[j = a].
"""

from typing import NamedTuple

import torch

NAMESPACE = {"native": "ppo_kernels_native", "triton": "ppo_kernels_triton"}

ELSEWHERE = -(2**31)

_libraries: list[torch.library.Library] = []


class LossInputs(NamedTuple):
    """What a loss takes of its tokens, in the order of the registered ops; there `temperature` is
    a tensor or None, and the number among the scalars."""

    tokens: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    denominator: torch.Tensor | float | None = None
    temperature: torch.Tensor | float | None = 1.0


class Objective(NamedTuple):
    """The numbers of a loss, in the order of the registered ops' scalars."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"


def any_fp64(*inputs):
    """True where one of the tensors, which may be None, is fp64."""
    return any(x is not None and x.dtype == torch.float64 for x in inputs)


def result_dtype(*inputs):
    """fp64 where an input is, fp32 otherwise: what an op computes in and gives per token."""
    return torch.float64 if any_fp64(*inputs) else torch.float32


def promoted(x, *others):
    """`x` in fp64 where one of the others, which may be None, is."""
    return x.double() if x.dtype != torch.float64 and any_fp64(*others) else x


def unscaled_dtype(x):
    """The dtype of a gradient in `x` before a loss scale, which fp16 need not hold."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _row(logits):
    return logits.new_empty(logits.shape[:-1], dtype=result_dtype(logits))


def _stats(logits):
    return logits.new_empty((*logits.shape[:-1], 2), dtype=result_dtype(logits))


def _scalars(x, n):
    return tuple(x.new_empty((), dtype=result_dtype(x)) for _ in range(n))


def _token_logprobs(logits, tokens, mask, temperatures, scalars):
    return _row(logits), _row(logits), _stats(logits)


def _token_logprobs_backward(
    grad_logprobs, grad_entropy, logits, tokens, entropy, softmax_stats, temperatures, scalars
):
    return logits.new_empty(logits.shape)


def _token_logprobs_backward_(*_):
    return None


def _token_statistics(logits, tokens, mask, temperatures, scalars):
    top1 = torch.empty_like(tokens, dtype=torch.bool, memory_format=torch.contiguous_format)
    return *(_row(logits) for _ in range(4)), top1, _row(logits)


def _sample_tokens(logits, uniforms, mask, temperatures, scalars):
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64), _row(logits)


def _kl_divergence(logits, ref_logits, mask, temperatures, scalars):
    return _row(logits), _stats(logits), _stats(logits)


def _kl_divergence_backward(
    grad_kl, logits, ref_logits, kl, softmax_stats, ref_softmax_stats, temperatures, scalars
):
    return logits.new_empty(logits.shape)


def _kl_estimate(logprobs, ref_logprobs, estimator):
    result = logprobs.new_empty(logprobs.shape, dtype=result_dtype(logprobs))
    return result, torch.empty_like(result)


def _gae(rewards, values, mask, dones, bootstrap_values, scalars):
    result = rewards.new_empty(rewards.shape, dtype=result_dtype(rewards, values))
    return result, torch.empty_like(result)


def _gae_packed(rewards, values, cu_seqlens, mask, dones, bootstrap_values, scalars):
    return _gae(rewards, values, mask, dones, bootstrap_values, scalars)


def _discounted_sums(x, decays, mask, dones, cu_seqlens):
    return x.new_empty(x.shape, dtype=result_dtype(x, decays))


def _ppo_loss_(logits, *_):
    return *_scalars(logits, 6), _row(logits), _row(logits)


def _ppo_loss(logits, *_):
    return *_ppo_loss_(logits), _stats(logits), _row(logits), _row(logits)


def _ppo_loss_and_gradient(logits, *_):
    return *_ppo_loss_(logits), logits.new_empty(logits.shape)


def _linear_token_logprobs(hidden, *_):
    return _row(hidden), _row(hidden), _stats(hidden)


def _linear_gradients(hidden, weight, wanted, sum_dtype, hidden_dtype):
    dtypes = hidden_dtype, sum_dtype, result_dtype(weight)
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    return tuple(
        hidden.new_empty(shape, dtype=dtype) if wants else hidden.new_empty(0)
        for shape, dtype, wants in zip(shapes, dtypes, wanted, strict=True)
    )


def _linear_token_logprobs_backward(grad_logprobs, grad_entropy, hidden, weight, bias, *rest):
    return _linear_gradients(hidden, weight, rest[-6:-3], rest[-3], hidden.dtype)


def _linear_ppo_loss(hidden, weight, bias, *rest):
    dtypes = torch.promote_types(rest[-3], unscaled_dtype(weight)), unscaled_dtype(hidden)
    return *_ppo_loss_(hidden), *_linear_gradients(hidden, weight, rest[-6:-3], *dtypes)


def _rescale_(grad, scale):
    return None


def _clipped_policy_loss(logprobs, *_):
    grad = logprobs.new_empty(logprobs.shape, dtype=result_dtype(logprobs))
    return *_scalars(logprobs, 3), grad


def _value_loss(values, *_):
    grad = values.new_empty(values.shape, dtype=result_dtype(values))
    return *_scalars(values, 2), grad


def _masked_mean(x, mask, denominator):
    return _scalars(x, 2)


def _masked_whiten(x, mask, scalars):
    return x.new_empty(x.shape, dtype=result_dtype(x))


_PPO_LOSS_ARGUMENTS = (
    "Tensor tokens, Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? ref_logprobs, "
    "Tensor? denominator, Tensor? temperatures, Tensor scalars, int kl_estimator"
)
_PPO_LOSS_RESULTS = (
    "Tensor loss, Tensor policy_loss, Tensor entropy, Tensor kl, Tensor approx_kl, "
    "Tensor clip_fraction, Tensor logprobs, Tensor token_entropy"
)
# `head_scalars` are logit_scale and softcap. Gradients that are not wanted come empty.
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor head_scalars"
_WANTED = (
    "bool wants_hidden, bool wants_weight, bool wants_bias, ScalarType sum_dtype, "
    "ScalarType logits_dtype, int chunk_bytes"
)
_HEAD_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"

SCHEMAS = {
    "token_logprobs": (
        "(Tensor logits, Tensor tokens, Tensor? mask, Tensor? temperatures, Tensor scalars)"
        " -> (Tensor logprobs, Tensor entropy, Tensor softmax_stats)",
        _token_logprobs,
    ),
    "token_logprobs_backward": (
        "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor tokens, "
        "Tensor entropy, Tensor softmax_stats, Tensor? temperatures, Tensor scalars)"
        " -> Tensor grad_logits",
        _token_logprobs_backward,
    ),
    "token_logprobs_backward_": (
        "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, Tensor tokens, "
        "Tensor entropy, Tensor softmax_stats, Tensor? temperatures, Tensor scalars) -> ()",
        _token_logprobs_backward_,
    ),
    "token_statistics": (
        "(Tensor logits, Tensor tokens, Tensor? mask, Tensor? temperatures, Tensor scalars)"
        " -> (Tensor logprobs, Tensor entropy, Tensor max_prob, Tensor sum_sq_probs, "
        "Tensor top1, Tensor varentropy)",
        _token_statistics,
    ),
    # `scalars` are temperature, top_k (inf keeps all), top_p and min_p (1 and 0 do).
    "sample_tokens": (
        "(Tensor logits, Tensor uniforms, Tensor? mask, Tensor? temperatures, Tensor scalars)"
        " -> (Tensor tokens, Tensor logprobs)",
        _sample_tokens,
    ),
    "linear_token_logprobs": (
        f"({_HEAD}, Tensor tokens, Tensor? mask, Tensor? temperatures, Tensor scalars, "
        "ScalarType logits_dtype, int chunk_bytes)"
        " -> (Tensor logprobs, Tensor entropy, Tensor softmax_stats)",
        _linear_token_logprobs,
    ),
    "linear_token_logprobs_backward": (
        f"(Tensor? grad_logprobs, Tensor? grad_entropy, {_HEAD}, Tensor tokens, Tensor entropy, "
        f"Tensor softmax_stats, Tensor? temperatures, Tensor scalars, {_WANTED})"
        f" -> ({_HEAD_GRADIENTS})",
        _linear_token_logprobs_backward,
    ),
    "linear_ppo_loss": (
        f"({_HEAD}, {_PPO_LOSS_ARGUMENTS}, {_WANTED}) -> ({_PPO_LOSS_RESULTS}, {_HEAD_GRADIENTS})",
        _linear_ppo_loss,
    ),
    "kl_divergence": (
        "(Tensor logits, Tensor ref_logits, Tensor? mask, Tensor? temperatures, Tensor scalars)"
        " -> (Tensor kl, Tensor softmax_stats, Tensor ref_softmax_stats)",
        _kl_divergence,
    ),
    "kl_divergence_backward": (
        "(Tensor grad_kl, Tensor logits, Tensor ref_logits, Tensor kl, Tensor softmax_stats, "
        "Tensor ref_softmax_stats, Tensor? temperatures, Tensor scalars) -> Tensor grad_logits",
        _kl_divergence_backward,
    ),
    "kl_estimate": (
        "(Tensor logprobs, Tensor ref_logprobs, int estimator) -> (Tensor kl, Tensor derivative)",
        _kl_estimate,
    ),
    "gae": (
        "(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, Tensor? bootstrap_values, "
        "Tensor scalars) -> (Tensor advantages, Tensor returns)",
        _gae,
    ),
    "gae_packed": (
        "(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? mask, Tensor? dones, "
        "Tensor? bootstrap_values, Tensor scalars) -> (Tensor advantages, Tensor returns)",
        _gae_packed,
    ),
    # S_t = x_t + decay_t S_(t+1); mask and dones as of gae.
    "discounted_sums": (
        "(Tensor x, Tensor decays, Tensor? mask, Tensor? dones, Tensor? cu_seqlens) -> Tensor",
        _discounted_sums,
    ),
    "ppo_loss": (
        f"(Tensor logits, {_PPO_LOSS_ARGUMENTS}) -> ({_PPO_LOSS_RESULTS}, "
        "Tensor softmax_stats, Tensor grad_logprobs, Tensor grad_token_entropy)",
        _ppo_loss,
    ),
    "ppo_loss_and_gradient": (
        f"(Tensor logits, {_PPO_LOSS_ARGUMENTS}) -> ({_PPO_LOSS_RESULTS}, Tensor grad_logits)",
        _ppo_loss_and_gradient,
    ),
    "ppo_loss_": (
        f"(Tensor(a!) logits, {_PPO_LOSS_ARGUMENTS}) -> ({_PPO_LOSS_RESULTS})",
        _ppo_loss_,
    ),
    "rescale_": ("(Tensor(a!) grad, Tensor scale) -> ()", _rescale_),
    "clipped_policy_loss": (
        "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, "
        "Tensor? denominator, Tensor scalars)"
        " -> (Tensor loss, Tensor approx_kl, Tensor clip_fraction, Tensor grad_logprobs)",
        _clipped_policy_loss,
    ),
    "value_loss": (
        "(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, Tensor? denominator, "
        "Tensor scalars) -> (Tensor loss, Tensor clip_fraction, Tensor grad_values)",
        _value_loss,
    ),
    "masked_mean": (
        "(Tensor x, Tensor? mask, Tensor? denominator) -> (Tensor mean, Tensor weight)",
        _masked_mean,
    ),
    "masked_whiten": ("(Tensor x, Tensor? mask, Tensor scalars) -> Tensor", _masked_whiten),
}


def define(backend):
    """Register every schema and fake under the backend's namespace; kernels are added by it."""
    library = torch.library.Library(NAMESPACE[backend], "DEF")
    for name, (schema, fake) in SCHEMAS.items():
        tags = [torch.Tag.pt2_compliant_tag]
        if "scalars" in schema:
            # Read when it is launched: `torch.compile` must not replay it with the old numbers.
            tags.append(torch.Tag.cudagraph_unsafe)
        library.define(name + schema, tags=tags)
        torch.library.register_fake(f"{NAMESPACE[backend]}::{name}", fake, lib=library)
    _libraries.append(library)
