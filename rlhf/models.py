"""Loading of the models, and the few forward passes that the stages share.

The reward model and the critic are both `AutoModelForSequenceClassification` with one label: the
reward model reads its head at the last real token, the critic reads it at every token.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.errors import UserError, one_line
from rlhf.hub import may_be_hub_id


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(bf16: bool) -> torch.autocast:
    return torch.autocast(default_device().type, dtype=torch.bfloat16, enabled=bf16)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. It must have EOS; without a pad token, EOS is pad."""
    tokenizer = _open(AutoTokenizer, path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} must have an EOS token, it has none: set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: str) -> PreTrainedModel:
    """A causal language model with fp32 weights. Raises UserError for a reward model or a critic:
    where embeddings are tied these lack nothing, and transformers would open them as well."""
    model = _open(AutoModelForCausalLM, path, dtype=torch.float32)
    for name in model.config.architectures or ():
        if name.endswith("ForSequenceClassification"):
            raise UserError(f"{path} is a {name}, a reward model or a critic: give a policy")
    return model.to(default_device())


def load_scorer(path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with one scalar output, from a scorer's folder or (with a new head) any other."""
    model, _ = _open_scorer(path, tokenizer)
    return model


def load_reward_model(path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A scorer whose head has been trained."""
    model, new_weights = _open_scorer(path, tokenizer)
    if new_weights:
        raise UserError(f"{path} is not a reward model, it has no scalar head: run rlhf reward")
    return model


def _open_scorer(
    path: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Collection[str]]:
    """The model, and the names of the weights that the folder lacks."""
    model, loading = _open(
        AutoModelForSequenceClassification,
        path,
        dtype=torch.float32,
        num_labels=1,
        output_loading_info=True,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(default_device()), loading["missing_keys"]


def _open(auto_class, path: str, **kwargs):
    is_folder = Path(path).is_dir()
    if not is_folder and not may_be_hub_id(path):
        raise UserError(f"there is no folder {path!r}: give that of a model, or a hub id")
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except Exception as error:  # a damaged folder raises whatever its reader raises
        kind = "folder" if is_folder else "hub id (there is no such folder)"
        raise UserError(f"cannot open the {kind} {path!r}: {one_line(error)}") from error


def check_fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, remedy: str
) -> None:
    """Raises UserError where the model has too few tokens or positions."""
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


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row, so that padding shifts nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


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


def value_head(policy: PreTrainedModel) -> PreTrainedModel:
    """A critic on the policy's own trunk; its new head gives 0 everywhere."""
    config = deepcopy(policy.config)
    config.num_labels = 1
    with torch.device("meta"):
        critic = AutoModelForSequenceClassification.from_config(config)
    setattr(critic, critic.base_model_prefix, policy.base_model)
    critic.score.to_empty(device=policy.device)
    nn.init.zeros_(critic.score.weight)
    return critic


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


def sequence_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The scalar head's fp32 output at each row's last real token, [B].

    The last real token comes from the mask. transformers' own forward compares ids with pad, and
    so misses a final EOS where pad == eos.
    """
    values = token_values(model, input_ids, attention_mask)
    index = torch.arange(values.shape[1], device=values.device)
    last = (index * attention_mask.long()).amax(-1, keepdim=True)
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
