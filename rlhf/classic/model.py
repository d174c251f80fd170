"""A causal language model with a value head on its last hidden states."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from rlhf.errors import UserError
from rlhf.models.generation import cache_keyword
from rlhf.models.passes import enable_gradient_checkpointing, freeze
from rlhf.models.weights import account_for

# Options that TRL took for models which are not trained as a whole.
REFUSED = ("peft_config", "reward_adapter", "load_in_8bit", "load_in_4bit")
IGNORED = ("is_trainable", "reward_adapter_name")  # which say something of these alone
HEAD_OPTIONS = ("summary_dropout_prob", "v_head_init_strategy", "v_head_initializer_range")
HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder")


class ValueHead(nn.Module):
    """A linear layer from hidden states (..., D) to values (..., 1), with dropout before it.

    It computes in the dtype of its weights, fp32 unless they are converted.
    """

    def __init__(self, hidden_size: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.summary(self.dropout(hidden).to(self.summary.weight.dtype))


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A transformers model, `pretrained_model`, and a value head, `v_head`.

    Saved, it is the model's own folder with the weights `v_head.summary.*` besides, as TRL wrote
    it: `AutoModelForCausalLM` opens it too. The class behaves as the model in `generate`, `config`,
    `save_pretrained`, `push_to_hub` and the names of its state dict.

    Args:
        pretrained_model: a causal language model, which is given a new head.
        summary_dropout_prob: of the head (default: the model's configuration's, or 0.1). The
            trainer keeps dropout off.
        v_head_init_strategy: of a new head, None (that of nn.Linear) or "normal": weights of
            standard deviation v_head_initializer_range, bias 0.
    """

    def __init__(
        self,
        pretrained_model: PreTrainedModel,
        *,
        summary_dropout_prob: float | None = None,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ):
        super().__init__()
        if v_head_init_strategy not in (None, "normal"):
            raise UserError(
                f"v_head_init_strategy must be None or 'normal', got {v_head_init_strategy!r}"
            )
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.v_head = _new_head(pretrained_model)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)
        if summary_dropout_prob is not None:
            self.v_head.dropout.p = summary_dropout_prob
        self.train(pretrained_model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Opens a folder or hub id, with the head that it holds or a new one; or wraps a model.

        Further arguments are those of the head, and those of `AutoModelForCausalLM`.
        """
        for name in REFUSED:
            if kwargs.pop(name, None):
                raise UserError(f"{name} is not supported: give a whole model, merged if need be")
        for name in IGNORED:
            kwargs.pop(name, None)
        head_options = {name: kwargs.pop(name) for name in HEAD_OPTIONS if name in kwargs}
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            return cls(pretrained_model_name_or_path, **head_options)
        path = pretrained_model_name_or_path
        place = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        kind = type(AutoConfig.from_pretrained(path, **place))
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(
                f"pretrained_model_name_or_path must be a causal language model that transformers "
                f"knows, {path} has a {kind.__name__}"
            )
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
        model, loading = _with_head(architecture).from_pretrained(
            path, *model_args, output_loading_info=True, **kwargs
        )
        account_for(path, model, loading)
        head = model.v_head
        del model.v_head
        model.__class__ = architecture
        wrapped = cls(model, **head_options)
        missing = [weights.isnan().all().item() for weights in head.state_dict().values()]
        if any(missing) and not all(missing):
            raise UserError(f"the value head in {path} is damaged: it lacks its weight or its bias")
        if not any(missing):
            wrapped.v_head.load_state_dict(head.state_dict())
        return wrapped

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs,
    ):
        """(logits (B, L, V), the language modelling loss if there are `labels`, values (B, L)), and
        the cache if `return_past_key_values`. Logits keep the model's dtype."""
        cache = cache_keyword(self.pretrained_model)
        if cache is None and (past_key_values is not None or return_past_key_values):
            raise UserError(f"a {type(self.pretrained_model).__name__} takes no past_key_values")
        if past_key_values is not None:
            kwargs[cache] = past_key_values
        outputs = self.pretrained_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **kwargs,
        )
        values = self.v_head(outputs.hidden_states[-1]).squeeze(-1)
        results = (outputs.logits, outputs.loss, values)
        return (*results, getattr(outputs, cache)) if return_past_key_values else results

    @property
    def num_positions(self) -> int | None:
        """Most tokens of a row; None if the model sets no bound."""
        return getattr(self.config, "max_position_embeddings", None)

    def generate(self, *args, **kwargs):
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self) -> None:
        """As PPOConfig.gradient_checkpointing does."""
        enable_gradient_checkpointing(self.pretrained_model)

    def gradient_checkpointing_disable(self) -> None:
        model = self.pretrained_model
        # As in enable_gradient_checkpointing.
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()

    @contextmanager
    def _whole(self) -> Iterator[PreTrainedModel]:
        """The model, which holds the head meanwhile."""
        self.pretrained_model.v_head = self.v_head
        try:
            yield self.pretrained_model
        finally:
            del self.pretrained_model.v_head

    def save_pretrained(self, *args, **kwargs):
        with self._whole() as model:
            return model.save_pretrained(*args, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        with self._whole() as model:
            return model.push_to_hub(*args, **kwargs)

    def state_dict(self, *args, **kwargs):
        with self._whole() as model:
            return model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        with self._whole() as model:
            return model.load_state_dict(*args, **kwargs)


def _new_head(model: PreTrainedModel) -> ValueHead:
    if model.get_output_embeddings() is None:
        raise UserError(
            f"pretrained_model must have a language modelling head, a {type(model).__name__} has "
            "none: give a causal language model"
        )
    # Not config.hidden_size: some models project their last hidden states.
    head = ValueHead(
        model.get_output_embeddings().weight.shape[1],
        getattr(model.config, "summary_dropout_prob", 0.1),
    )
    return head.to(model.device)


def _with_head(architecture: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of the same name whose models hold a `v_head`, so that transformers reads it from
    whatever kind of file the folder has; of a folder without head its weights are NaN."""

    def __init__(self, config):
        architecture.__init__(self, config)
        self.v_head = _new_head(self)
        self.post_init()

    def _init_weights(self, module):
        """Called by transformers, which keeps these functions from what it has read."""
        if module is self.v_head.summary:
            nn.init.constant_(module.weight, math.nan)
            nn.init.constant_(module.bias, math.nan)
        else:
            architecture._init_weights(self, module)

    attributes = {
        "__init__": __init__,
        "_init_weights": _init_weights,
        # Not reported as missing: a folder without head is no fault.
        "_keys_to_ignore_on_load_missing": [
            *(architecture._keys_to_ignore_on_load_missing or []),
            r"^v_head\.",
        ],
        "__module__": architecture.__module__,
        "_keep_in_fp32_modules_strict": [
            *(architecture._keep_in_fp32_modules_strict or []),
            "v_head",
        ],
    }
    return type(architecture.__name__, (architecture,), attributes)


def create_reference_model(
    model: AutoModelForCausalLMWithValueHead, num_shared_layers: int | None = None
) -> AutoModelForCausalLMWithValueHead:
    """A frozen copy of the model.

    With `num_shared_layers` the embeddings and the first so many layers are not copied: they are
    frozen in `model` too, and both use them.
    """
    shared = [] if num_shared_layers is None else _first_parameters(model, num_shared_layers)
    memo = {id(parameter): parameter for parameter in shared}
    return freeze(copy.deepcopy(model, memo))


def _first_parameters(
    model: AutoModelForCausalLMWithValueHead, num_layers: int
) -> list[nn.Parameter]:
    """The parameters that come before those of layer `num_layers`."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    count = len(model.get_submodule(names[0])) if names else 0
    if not 0 < num_layers < count:
        raise UserError(
            f"num_shared_layers must be from 1 to {count - 1}, for the model has {count} layers, "
            f"got {num_layers}"
        )
    first = next(model.get_submodule(f"{names[0]}.{num_layers}").parameters())
    parameters = list(model.parameters())
    return parameters[: [parameter is first for parameter in parameters].index(True)]
