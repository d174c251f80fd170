"""Functions of OpenRLHF 0.11.2's `openrlhf.models.utils`.

Results have OpenRLHF's shapes and dtype: that of the logits, but fp32 for half precision under
autocast on CUDA. Half precision ones are the exact ones rounded once. Where its entropy is NaN, at
-inf logits, these are finite.
"""

from torch import Tensor

from ppo_kernels.integrations.common import entropy, softmax_dtype
from ppo_kernels.logprobs import token_logprobs


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `labels`: (..., V), (...) -> (...), differentiable.

    As in OpenRLHF a temperature other than 1 divides the logits in place, and who reads them
    afterwards finds them divided.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    return token_logprobs(logits, labels).to(softmax_dtype(logits))


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of each row, in nats: (..., V) -> (...), differentiable."""
    return entropy(logits).to(softmax_dtype(logits))


REPLACES = {"openrlhf.models.utils": (log_probs_from_logits, compute_entropy)}
