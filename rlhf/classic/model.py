"""A causal language model with a value head on its last hidden states."""

import copy

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from rlhf.errors import UserError
from rlhf.models import freeze

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
    """A transformers model, `pretrained_model`, that holds a value head, `v_head`.

    Saved, it is the model's own folder with the weights `v_head.summary.*` besides, as TRL wrote
    it: `AutoModelForCausalLM` opens it too. The class behaves as the model in `generate`, `config`,
    `save_pretrained`, `push_to_hub` and the names of its state dict.

    Args:
        pretrained_model: a causal language model; one without `v_head` is given a new one.
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
        if not hasattr(pretrained_model, "v_head"):
            pretrained_model.v_head = _new_head(pretrained_model)
            if v_head_init_strategy == "normal":
                nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
                nn.init.zeros_(self.v_head.summary.bias)
        if summary_dropout_prob is not None:
            self.v_head.dropout.p = summary_dropout_prob

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Opens a folder or hub id, with the head that it holds or a new one; or wraps a model.

        Further arguments are those of the head, and those of `AutoModelForCausalLM`.
        """
        if kwargs.get("peft_config") is not None:
            raise UserError("peft_config is not supported: give a whole model, merged if need be")
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
        model, loading = _with_head(MODEL_FOR_CAUSAL_LM_MAPPING[kind]).from_pretrained(
            path, *model_args, output_loading_info=True, **kwargs
        )
        if any(name.startswith("v_head.") for name in loading["missing_keys"]):
            del model.v_head
        return cls(model, **head_options)

    @property
    def v_head(self) -> ValueHead:
        return self.pretrained_model.v_head

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
        outputs = self.pretrained_model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **kwargs,
        )
        values = self.v_head(outputs.hidden_states[-1]).squeeze(-1)
        results = (outputs.logits, outputs.loss, values)
        return (*results, outputs.past_key_values) if return_past_key_values else results

    def generate(self, *args, **kwargs):
        return self.pretrained_model.generate(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        return self.pretrained_model.save_pretrained(*args, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        return self.pretrained_model.push_to_hub(*args, **kwargs)

    def state_dict(self, *args, **kwargs):
        return self.pretrained_model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.pretrained_model.load_state_dict(*args, **kwargs)


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
    whatever kind of file the folder has."""

    def __init__(self, config):
        architecture.__init__(self, config)
        self.v_head = _new_head(self)
        self.post_init()

    attributes = {
        "__init__": __init__,
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
