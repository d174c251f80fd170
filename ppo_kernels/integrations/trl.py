"""Functions of TRL's `trl.trainer.utils`, 1.12.0 and what 1.14 to 1.16 add to it.

TRL's trainers score tokens with those of logits up to 1.14. From 1.15 on only experimental ones do
(SDPO, SDFT, CPO, ORPO ...); the others, GRPO among them, take log-probs from hidden states by
`trl.kernels.ChunkedLogProbFunction`, which has a stand-in here too.

Results have the shapes and dtype of TRL's in PyTorch: of logits theirs, but fp32 for half precision
under autocast on CUDA. Half precision ones are the exact ones rounded once. Where TRL's entropy is
NaN, at -inf logits, these are finite. TRL's `masked_mean` and `masked_whiten` are left alone: they
are arithmetic on (B, T), with another variance than ours.
"""

import torch
from torch import Tensor

from ppo_kernels.integrations.common import entropy, softmax_dtype
from ppo_kernels.linear import linear_token_logprobs_and_entropy
from ppo_kernels.logprobs import token_logprobs, token_logprobs_and_entropy


def _within(row_mask, x):
    """`x`, 0 where the mask is."""
    return x if row_mask is None else x.masked_fill(row_mask == 0, 0)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float | Tensor = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature) at `index`.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64; rows may be strided, V must not.
        index: (...) or (..., K) int64 ids in [0, V).
        temperature: > 0 (TRL 1.14).
        row_mask: of the shape of `index`, gives 0 where it is 0; ids there are not looked at
            (TRL 1.14).

    Returns:
        Log-probabilities in nats, of the shape of `index`, differentiable. K of a row differ
        by their logits, so that one sweep serves them all.

    Raises:
        TypeError, ValueError: as `ppo_kernels.token_logprobs`, whose `tokens` are `index`.
    """
    index = _within(row_mask, index)
    if index.ndim < logits.ndim:
        logprobs = token_logprobs(logits, index, temperature=temperature)
    elif not index.shape[-1]:
        logprobs = logits.gather(-1, index)
    else:
        chosen = logits.gather(-1, index).to(torch.promote_types(logits.dtype, torch.float32))
        chosen = chosen / temperature
        best = chosen.argmax(-1, keepdim=True)
        tokens = index.gather(-1, best).squeeze(-1)
        logprobs = token_logprobs(logits, tokens, temperature=temperature).unsqueeze(-1)
        logprobs = chosen - chosen.gather(-1, best) + logprobs
        logprobs = logprobs.masked_fill(chosen == -torch.inf, -torch.inf)
    return _within(row_mask, logprobs.to(softmax_dtype(logits)))


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both of softmax(logits / temperature) from one sweep (TRL 1.14).

    Arguments and errors are those of `selective_log_softmax`, with an `index` of (...).

    Returns:
        log-probabilities, entropy: (...) in nats. The entropy is differentiable if
        `entropy_requires_grad`.
    """
    index = _within(row_mask, index)
    logprobs, entropy = (
        _within(row_mask, x.to(softmax_dtype(logits)))
        for x in token_logprobs_and_entropy(logits, index, temperature=temperature)
    )
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row, in nats: (..., V) -> (...), differentiable.

    `chunk_size` is TRL's and has no effect: nothing of the size of the vocabulary is allocated.
    """
    return entropy(logits).to(softmax_dtype(logits))


class ChunkedLogProbFunction:
    """TRL's autograd function of 1.15 and 1.16, called by `apply`."""

    theirs = None  # TRL's own, from the first `patch` on

    @staticmethod
    def apply(*arguments):
        return ChunkedLogProbFunction.forward(None, *arguments)

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):
        """`ppo_kernels.linear_token_logprobs_and_entropy`, of which most arguments are.

        A call for another of the `outputs`, as SFT, DPO and KTO make some, goes to TRL's own
        function; so does one with a logit scale <= 0 or a head that DeepSpeed's ZeRO-3 partitions,
        which is whole again in the backward of TRL's only.

        Args:
            weight, bias: copied to the dtype of `hidden` where they have another (an fp32 head in
                a bf16 model); the copy lives until the backward.
            chunk_size: TRL's, has no effect here.

        Returns:
            log-probabilities, entropy or None, None, None, None: (N,) fp32.
        """
        scored = {"log_probs", "entropy"}
        if not scored.issuperset(outputs) or logit_scale <= 0 or hasattr(weight, "ds_id"):
            if ChunkedLogProbFunction.theirs is None:
                raise ValueError(
                    "before patch outputs must be of log_probs and entropy, logit_scale > 0 and "
                    f"weight whole, got {outputs}, {logit_scale} and a {type(weight).__name__}"
                )
            return ChunkedLogProbFunction.theirs.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        weight, bias = (x if x is None else x.to(hidden.dtype) for x in (weight, bias))
        logprobs, entropy = linear_token_logprobs_and_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            grad_weight_dtype=torch.promote_types(weight.dtype, torch.float32),
        )
        entropy = entropy.float() if "entropy" in outputs else None
        return logprobs.float(), entropy, None, None, None


REPLACES = {"trl.trainer.utils": (selective_log_softmax, entropy_from_logits)}
REPLACES_IN_LATER_VERSIONS = {
    "trl.trainer.utils": (selective_log_softmax_and_entropy,),
    "trl.kernels": (ChunkedLogProbFunction,),
}
