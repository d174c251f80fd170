"""Opening of models and tokenizers.

A folder is opened only if every weight is accounted for, see `weights.py`.

The reward model and the critic are both scorers, a model's trunk and a scalar head `score`: the
reward model reads its head at the last token, the critic reads it at every token.
"""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf.data.hub import may_be_hub_id, say_asking
from rlhf.errors import UserError, one_line
from rlhf.models.passes import default_device, trunk
from rlhf.models.weights import account_for, quiet

HEAD = "score.weight"


class LoadingOptions(Protocol):
    """The options of a command by which models are opened."""

    dtype: str | None
    attn_implementation: str | None
    trust_remote_code: bool


def load_tokenizer(
    path: str, options: LoadingOptions | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. It must have EOS; without a pad token, EOS is pad."""
    tokenizer = _open(AutoTokenizer, path, **_code(options), revision=revision)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} must have an EOS token, it has none: set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    path: str,
    options: LoadingOptions | None = None,
    *,
    revision: str | None = None,
    frozen: bool = False,
) -> PreTrainedModel:
    """A decoder-only language model; `frozen` tells that it will not be trained, so that its
    weights may have fewer digits.

    Raises UserError for any other kind of model. A reward model or a critic lacks nothing where
    embeddings are tied, and transformers would open it as well.
    """
    config = _open_config(path, options, revision)
    for name in config.architectures or ():
        if name.endswith("ForSequenceClassification"):
            raise UserError(f"{path} is a {name}, a reward model or a critic: give a policy")
    if not (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or _maps_code(config, AutoModelForCausalLM)
    ):
        raise UserError(
            f"{path} is a {_architecture(config)}, which is no causal language model: give one"
        )
    model, loading = _open_model(AutoModelForCausalLM, path, config, options, revision, frozen)
    account_for(path, model, loading)
    return model.to(default_device())


def load_scorer(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadingOptions | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A model with one scalar output, from a scorer's folder or (with a new head) any other."""
    model, _ = _open_scorer(path, options, revision)
    # A critic is saved with the policy's tokenizer. Where EOS pads nobody can tell it from padding:
    # without a pad token transformers reads single rows right, and refuses batches.
    pad = tokenizer.pad_token_id
    _set_pad_token(model, None if pad == tokenizer.eos_token_id else pad)
    return model


def load_learning_reward_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadingOptions | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A scorer that will learn to be a reward model, and be saved with `tokenizer`.

    With a new head it reads EOS. Where EOS pads the tokenizer is given a pad token of its own, and
    the model a row for it: everywhere else the head is read at the last token that is no padding.
    """
    model, is_new = _open_scorer(path, options, revision)
    if is_new:
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            name = "<|pad|>"
            while name in tokenizer.get_vocab():
                name = f"<{name}>"
            tokenizer.add_special_tokens({"pad_token": name})
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        _set_pad_token(model, tokenizer.pad_token_id)
    return model


def load_reward_model(path: str, options: LoadingOptions | None = None) -> PreTrainedModel:
    """A scorer whose head has been trained, to be used but not to be saved."""
    model, is_new = _open_scorer(path, options, frozen=True)
    if is_new:
        raise UserError(f"{path} is not a reward model, it has no scalar head: run rlhf reward")
    return model


def padding_in_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """EOS, where a scorer's configuration takes it for padding, else None.

    transformers reads such a scorer's head before EOS, and so it was trained elsewhere.
    """
    pad = model.config.get_text_config().pad_token_id
    return pad if pad == tokenizer.eos_token_id else None


def _set_pad_token(model: PreTrainedModel, pad_token_id: int | None) -> None:
    # A configuration of several parts has it in each.
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = pad_token_id


def _open_scorer(
    path: str,
    options: LoadingOptions | None,
    revision: str | None = None,
    frozen: bool = False,
) -> tuple[PreTrainedModel, bool]:
    """The model, its head in fp32, and whether the head is new."""
    config = _open_config(path, options, revision)
    is_classifier = any("ForSequenceClassification" in name for name in config.architectures or ())
    if is_classifier and config.num_labels != 1:
        raise UserError(
            f"{path} is a classifier with {config.num_labels} labels ({_architecture(config)}): a "
            "reward model has 1; call it in a reward function of yours"
        )
    model_class = scorer_class(config)
    if getattr(model_class, "config_class", None) is type(config.get_text_config()):
        config = config.get_text_config()
    unfit = UserError(
        f"{path} is a {_architecture(config)}, whose score is not read at the last token: give a "
        "decoder's, or call it in a reward function of yours"
    )
    if model_class is None:
        raise unfit
    config.num_labels = 1
    if model_class is not AutoModelForSequenceClassification and not is_classifier:
        # By way of the language model, whose weights may have other names than a trunk's.
        policy, loading = _open_model(AutoModelForCausalLM, path, config, options, revision, frozen)
        account_for(path, policy, loading)
        model = new_scorer(policy)
        nn.init.normal_(model.score.weight, std=getattr(config, "initializer_range", 0.02))
        return model.to(default_device()), True
    model, loading = _open_model(model_class, path, config, options, revision, frozen)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise unfit
    is_new = HEAD in loading["missing_keys"] and not is_classifier
    if is_new:
        causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), PreTrainedModel)
        heads = ("lm_head.", *(getattr(causal, "_tied_weights_keys", None) or ()))
        unused = {name for name in loading["unexpected_keys"] if not name.startswith(heads)}
        missing = set(loading["missing_keys"]) - {HEAD}
        loading |= {"missing_keys": missing, "unexpected_keys": unused}
    account_for(path, model, loading)
    model.score.float()
    return model.to(default_device()), is_new


def scorer_class(config: PreTrainedConfig) -> type | None:
    """Finds the class that opens a scorer of this kind: transformers', or where it has none one of
    the same make; None for models that are not causal.

    Folders of the latter are opened by rlhf alone. In them trunk and head stand under the names
    that transformers would give them.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or _maps_code(
        config, AutoModelForSequenceClassification
    ):
        return AutoModelForSequenceClassification
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    family = next(base for base in causal.__mro__ if base.__name__.endswith("PreTrainedModel"))
    stem = re.sub("(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", causal.__name__)
    attributes = {
        "config_class": causal.config_class,
        "base_model_prefix": causal.base_model_prefix,
        # Of classes of other modules transformers leaves buffers that it does not save undefined.
        "__module__": causal.__module__,
    }
    bases = (GenericForSequenceClassification, family)
    return type(f"{stem}ForSequenceClassification", bases, attributes)


def new_scorer(policy: PreTrainedModel) -> PreTrainedModel:
    """A scorer on the policy's own trunk, with an fp32 head that has no values yet."""
    config = deepcopy(policy.config)
    config.num_labels = 1
    model_class = scorer_class(config)
    if model_class is None:
        raise UserError(
            f"a {type(policy).__name__} can have no scalar head: transformers does not know its "
            "kind"
        )
    try:
        with torch.device("meta"):
            if model_class is AutoModelForSequenceClassification:
                # The policy's own code runs already, if it came with some.
                trusts = type(policy).__module__.startswith("transformers_modules")
                scorer = model_class.from_config(config, trust_remote_code=trusts)
            else:
                scorer = model_class(config)
    except Exception as error:  # as the class of a configuration without hidden_size
        raise UserError(
            f"a {type(policy).__name__} can have no scalar head: {one_line(error)}"
        ) from error
    if type(scorer.base_model) is not type(trunk(policy)):
        raise UserError(
            f"a {type(policy).__name__} can have no scalar head: of its kind transformers opens "
            f"another trunk, a {type(scorer.base_model).__name__}"
        )
    setattr(scorer, scorer.base_model_prefix, trunk(policy))
    scorer.score.to_empty(device=policy.device).float()
    return scorer


def value_head(policy: PreTrainedModel) -> PreTrainedModel:
    """A critic on the policy's own trunk; its new head gives 0 everywhere."""
    critic = new_scorer(policy)
    nn.init.zeros_(critic.score.weight)
    return critic


def _open_config(
    path: str, options: LoadingOptions | None, revision: str | None
) -> PreTrainedConfig:
    if Path(path, "adapter_config.json").exists():
        raise UserError(
            f"{path} holds a LoRA adapter (adapter_config.json): merge it into its base model "
            "(peft's merge_and_unload) and give the folder of the merged one"
        )
    config = _open(AutoConfig, path, **_code(options), revision=revision)
    if config.is_encoder_decoder:
        raise UserError(
            f"{path} is an encoder-decoder ({_architecture(config)}): give a decoder-only language "
            "model"
        )
    return config


def _open_model(
    model_class: type,
    path: str,
    config: PreTrainedConfig,
    options: LoadingOptions | None,
    revision: str | None,
    frozen: bool,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of its weights."""
    given = {} if options is None else {"attn_implementation": options.attn_implementation}
    return _open(
        model_class,
        path,
        **_code(options),
        **given,
        revision=revision,
        config=config,
        dtype=_dtype(options, frozen),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )


def _dtype(options: LoadingOptions | None, frozen: bool) -> torch.dtype | str:
    if options is not None and options.dtype is not None:
        return "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    on_gpu = default_device().type == "cuda"
    return torch.bfloat16 if frozen and on_gpu else torch.float32


def _code(options: LoadingOptions | None) -> dict[str, bool]:
    """Code of a folder runs only if asked for. Without a word transformers would ask on stdin."""
    return {"trust_remote_code": options is not None and options.trust_remote_code}


def _maps_code(config: PreTrainedConfig, auto_class: type) -> bool:
    """Tells whether the folder brings code of its own for such a model."""
    return auto_class.__name__ in (getattr(config, "auto_map", None) or {})


def _architecture(config: PreTrainedConfig) -> str:
    return next(iter(config.architectures or ()), type(config).__name__.removesuffix("Config"))


def _open(auto_class: type, path: str, **kwargs):
    is_folder = Path(path).is_dir()
    if not is_folder and not may_be_hub_id(path):
        raise UserError(f"there is no folder {path!r}: give that of a model, or a hub id")
    if not is_folder:
        say_asking(path)
    try:
        with quiet():
            return auto_class.from_pretrained(path, **kwargs)
    except Exception as error:  # a damaged folder raises whatever its reader raises
        if not kwargs["trust_remote_code"] and "trust_remote_code" in str(error):
            raise UserError(
                f"{path} needs Python code that it brings with it, which can do anything: let it "
                "run with --trust_remote_code true, or give another model"
            ) from error
        kind = "folder" if is_folder else "hub id (there is no such folder)"
        raise UserError(f"cannot open the {kind} {path!r}: {one_line(error)}") from error
