"""The few forward passes that the stages share, and what a model must have for them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.errors import UserError


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(bf16: bool) -> torch.autocast:
    return torch.autocast(default_device().type, dtype=torch.bfloat16, enabled=bf16)


def check_fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, remedy: str
) -> None:
    """Raises UserError where the model has too few tokens or positions, or where its positions
    depend on the longest row of a pass."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: "
            "use the tokenizer that belongs to the model"
        )
    positions = getattr(model.config, "max_position_embeddings", length)
    if length > positions:
        raise UserError(
            f"sequences of up to {length} tokens do not fit the model's {positions} positions: "
            f"{remedy}"
        )
    switch = min(_longrope_switches(model.config.get_text_config()), default=length)
    if length > switch:
        raise UserError(
            f"sequences of up to {length} tokens are beyond the {switch} positions where the "
            "model's longrope takes other frequencies, for all rows of a pass by the longest, so "
            f"that a token's log-prob would depend on the other rows: {remedy}"
        )


def _longrope_switches(config: PreTrainedConfig) -> Iterator[int]:
    """The lengths beyond which a pass has other rotary frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            yield parameters["original_max_position_embeddings"]


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row, so that padding shifts nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def trunk(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; some have it under another name than their own `base_model`."""
    if model.base_model is not model:
        return model.base_model
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def scalar_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The scorer's head on hidden states (..., D), in fp32 also within autocast: a score in bf16
    would have three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.float()).squeeze(-1)


def token_values(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The scalar head's fp32 output at every token, [B, L]."""
    hidden = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        use_cache=False,
    ).last_hidden_state
    return scalar_head(model, hidden)


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} does not support gradient_checkpointing: turn it off"
        )
    # Its name from transformers 6 on, and the one until then.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within it, layers with gradient checkpointing enabled do checkpoint.

    transformers' layers do so in training mode only, but dropout, which would go with it, must stay
    off: so the layers alone, without what they hold, are put into it, and the probabilities by
    which some layers themselves drop out, their own or their configuration's, are 0 meanwhile.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    dropouts = [
        (owner, name, value)
        for owner in {id(owner): owner for owner in (*layers, *configs)}.values()
        for name, value in vars(owner).items()
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name)
    ]
    try:
        for owner, name, _ in dropouts:
            setattr(owner, name, 0.0)
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
        for owner, name, value in dropouts:
            setattr(owner, name, value)


def sequence_scores(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, skipped: int | None = None
) -> Tensor:
    """The scalar head's fp32 output at each row's last real token, [B].

    The last real token comes from the mask. transformers' own forward compares ids with pad, and
    so misses a final EOS where pad == eos; `skipped`, the id that it would pass over, does so too.
    """
    values = token_values(model, input_ids, attention_mask)
    index = torch.arange(values.shape[1], device=values.device)
    read = (
        attention_mask.bool() if skipped is None else attention_mask.bool() & (input_ids != skipped)
    )
    last = (index * read).amax(-1, keepdim=True)
    return values.gather(1, last).squeeze(1)


def set_score_normalisation(model: PreTrainedModel, scores: Tensor) -> None:
    """Stores the mean and the standard deviation of `scores` with the reward model."""
    model.config.reward_mean = scores.mean().item()
    model.config.reward_std = scores.std(correction=0).item()


def normalise_scores(model: PreTrainedModel, scores: Tensor) -> Tensor:
    """Scores in units of the training data's spread; unchanged for a model that stores none."""
    mean = getattr(model.config, "reward_mean", 0.0)
    std = getattr(model.config, "reward_std", 1.0)
    return (scores - mean) / max(std, 1e-6)


def freeze(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
