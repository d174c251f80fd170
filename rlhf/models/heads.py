"""What a policy says of response tokens: read off its logits, or off the last hidden states and the
head's weight, so that logits (B, T, V) never exist.

Both ways suppress what cannot be sampled as `Stopping.suppress_` does, and give the same figures.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_kernels import (
    PPOLoss,
    linear_ppo_loss,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    ppo_loss_,
    token_logprobs,
    token_logprobs_and_entropy,
)
from rlhf.errors import UserError
from rlhf.models.generation import Stopping
from rlhf.models.passes import positions, scalar_head, token_values, trunk
from rlhf.run.terminal import say

# Of this many tokens, `auto` takes the hidden states.
LARGE_VOCABULARY = 32_000


class TokenLogits(NamedTuple):
    """T tokens of each response by their logits (B, T, V). Each method takes `tokens` (B, T) and
    what the function of its name does, where the pass was under autocast under autocast;
    `ppo_loss` can be called once, and last."""

    logits: Tensor

    def logprobs(self, tokens: Tensor, **options) -> Tensor:
        return token_logprobs(self.logits, tokens, **options)

    def logprobs_and_entropy(self, tokens: Tensor, **options) -> tuple[Tensor, Tensor]:
        return token_logprobs_and_entropy(self.logits, tokens, **options)

    def ppo_loss(self, tokens: Tensor, *per_token: Tensor, **options) -> PPOLoss:
        return ppo_loss_(self.logits, tokens, *per_token, **options)


class LogitRule(NamedTuple):
    """Logits z = softcap(logit_scale (h Wᵀ + b)) of hidden states h; softcap(x) = c tanh(x / c)."""

    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, layer: nn.Linear) -> Tensor:
        logits = self.logit_scale * layer(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class TokenStates(NamedTuple):
    """`TokenLogits` of T hidden states (B, T, D), the weight (V, D) and bias (V) of the head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rule: LogitRule
    stopping: Stopping

    def logprobs(self, tokens: Tensor, **options) -> Tensor:
        return torch.cat(list(self._each(linear_token_logprobs, tokens, **options)), dim=1)

    def logprobs_and_entropy(self, tokens: Tensor, **options) -> tuple[Tensor, Tensor]:
        parts = self._each(linear_token_logprobs_and_entropy, tokens, **options)
        logprobs, entropy = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return logprobs, entropy

    def ppo_loss(self, tokens: Tensor, *per_token: Tensor, **options) -> PPOLoss:
        """`options` has the denominator of all tokens: the loss of each part is a share."""
        parts = self._each(linear_ppo_loss, tokens, *per_token, **options)
        fields = zip(*parts, strict=True)
        return PPOLoss(*(torch.cat(part, dim=1) if part[0].ndim else sum(part) for part in fields))

    def _each(self, function, *per_token: Tensor, **options) -> Iterator:
        """The function's results, first of the positions at which no response may end: there, the
        bias of what ends it is -inf."""
        width, early = self.hidden.shape[1], self.stopping.min_length
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        for columns, own_bias in (
            (slice(0, early), bias.index_fill(0, self.stopping.ids, -torch.inf)),
            (slice(early, width), self.bias),
        ):
            hidden = self.hidden[:, columns]
            if hidden.shape[1]:
                yield function(
                    hidden,
                    self.weight,
                    *(x[:, columns] for x in per_token),
                    bias=own_bias,
                    **self.rule._asdict(),
                    **options,
                )


class LogitsHead:
    """Reads tokens off the logits."""

    def __init__(self, stopping: Stopping):
        self.stopping = stopping

    def __call__(
        self,
        policy: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_tokens: int,
        output_hidden_states: bool = False,
    ) -> tuple[TokenLogits, Tensor | None]:
        """What the policy says at the last `num_tokens` positions; and, if asked for, the last
        hidden states (B, L, D) of all."""
        outputs = policy(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask),
            use_cache=False,
            logits_to_keep=num_tokens,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.hidden_states[-1] if output_hidden_states else None
        return TokenLogits(self.stopping.suppress_(outputs.logits)), hidden


class HiddenHead:
    """Reads tokens off the last hidden states, of a model that makes its logits by this rule."""

    def __init__(self, stopping: Stopping, rule: LogitRule):
        self.stopping = stopping
        self.rule = rule

    def __call__(
        self,
        policy: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_tokens: int,
        output_hidden_states: bool = True,
    ) -> tuple[TokenStates, Tensor]:
        """As that of LogitsHead; the hidden states are there, asked for or not."""
        hidden = policy.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask),
            use_cache=False,
        ).last_hidden_state
        layer = policy.get_output_embeddings()
        # Rows that the tokenizer does not know cannot be sampled.
        rows = slice(0, self.stopping.vocab_size)
        bias = None if layer.bias is None else layer.bias[rows]
        states = hidden[:, -num_tokens:], layer.weight[rows], bias
        return TokenStates(*states, self.rule, self.stopping), hidden


Head = LogitsHead | HiddenHead


class ActorCritic(nn.Module):
    """A policy and its critic as one module, which DistributedDataParallel can wrap.

    The critic is a scorer of its own, or one whose trunk is the policy's (`value_head`).
    """

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel, head: Head):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.head = head

    @property
    def shares_trunk(self) -> bool:
        return self.critic.base_model is trunk(self.policy)

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's parameters that are not the policy's."""
        shared = set(self.policy.parameters())
        return [parameter for parameter in self.critic.parameters() if parameter not in shared]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, num_tokens: int
    ) -> tuple[TokenLogits | TokenStates, Tensor]:
        """What the policy says at the last `num_tokens` positions, and fp32 values (B, num_tokens)
        there."""
        tokens, hidden = self.head(
            self.policy, input_ids, attention_mask, num_tokens, self.shares_trunk
        )
        if self.shares_trunk:
            values = scalar_head(self.critic, hidden)
        else:
            values = token_values(self.critic, input_ids, attention_mask)
        return tokens, values[:, -num_tokens:]


@torch.no_grad()
def find_rule(model: PreTrainedModel) -> LogitRule | None:
    """How the model makes logits, by its configuration (that of Gemma 2, Cohere and Granite among
    others) and proven on a few tokens; None if it does so otherwise."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(layer, nn.Linear) or model.base_model is model:
        return None
    scale = getattr(config, "logit_scale", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    rule = LogitRule(scale / scaling, getattr(config, "final_logit_softcapping", None))
    ids = torch.arange(min(8, len(layer.weight)), device=model.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    atol = 1e-4 * logits.abs().max().item()

    def gives(rule: LogitRule) -> bool:
        return torch.allclose(rule.logits(hidden, layer), logits, rtol=1e-4, atol=atol)

    # Of small logits nobody can tell whether they were capped.
    untold = rule.softcap is not None and gives(rule._replace(softcap=None))
    return rule if gives(rule) and not untold else None


def make_head(
    logits_from: str, model: PreTrainedModel, stopping: Stopping, *, filtered: bool = False
) -> Head:
    """The head that the option `logits_from` asks for; `auto`, which may choose, says so where it
    cannot take the hidden states of a large vocabulary. `filtered` tells that tokens are drawn from
    a part of it."""
    size = model.config.get_text_config().vocab_size
    if logits_from == "logits" or (logits_from == "auto" and size < LARGE_VOCABULARY):
        return LogitsHead(stopping)
    rule = None if filtered else find_rule(model)
    if filtered:
        reason = "top_k, top_p and min_p need the logits of what they keep"
    elif rule is None:
        reason = (
            f"{type(model).__name__} makes its logits otherwise than by one matrix, a scale and a "
            "soft cap, or they are too small to show the cap"
        )
    elif rule.softcap is not None and stopping.min_length:
        reason = "a soft cap would let in again what min_response_length rules out"
    else:
        return HiddenHead(stopping, rule)
    if logits_from == "hidden":
        raise UserError(f"logits_from hidden cannot be: {reason}: take auto or logits")
    say(f"logits_from auto takes logits: {reason}")
    return LogitsHead(stopping)
