"""Sampling through transformers' `generate`."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.classic import checks
from rlhf.classic.model import AutoModelForCausalLMWithValueHead
from rlhf.data.padding import pad
from rlhf.errors import UserError


def check_arguments(
    model: AutoModelForCausalLMWithValueHead,
    query_tensor: Tensor | list[Tensor],
    batch_size: int,
    options: dict,
) -> None:
    """Raises UserError for what `PPOTrainer.generate` cannot do."""
    is_list = isinstance(query_tensor, list)
    if not is_list and not (isinstance(query_tensor, Tensor) and query_tensor.dim() == 1):
        got = getattr(query_tensor, "shape", type(query_tensor).__name__)
        raise UserError(f"query_tensor must be 1-D or a list of 1-D tensors, got {got}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size must be an integer >= 1, got {batch_size!r}")
    num_sequences = _option("num_return_sequences", model, options) or 1
    if is_list and num_sequences > 1:
        raise UserError(
            f"num_return_sequences must be 1 for a list of queries, got {num_sequences}: repeat "
            "the queries"
        )
    unseen = [name for name in ("stop_strings", "stopping_criteria") if options.get(name)]
    if is_list and batch_size > 1 and unseen:
        raise UserError(
            f"{unseen[0]} leave no token by which a response of a batch ends: give batch_size=1"
        )
    if _option("return_dict_in_generate", model, options):
        raise UserError("return_dict_in_generate must be False: rows of token ids are returned")


def set_temperature(options: dict, temperature: float) -> None:
    """Samples at PPOConfig.temperature, unless the options have another, which is warned of."""
    given = getattr(options.get("generation_config"), "temperature", None)
    given = options.get("temperature", given)
    if given is None:
        options["temperature"] = temperature
    elif given != temperature:
        warnings.warn(
            f"temperature {given} is not PPOConfig.temperature {temperature}, by which step() "
            "divides the logits: set it there",
            stacklevel=3,
        )


def generate_rows(
    model: AutoModelForCausalLMWithValueHead,
    queries: list[Tensor],
    batch_size: int,
    length_sampler: Callable[[], int] | None,
    *,
    eos_token_id: int | None,
    return_prompt: bool,
    options: dict,
) -> list[Tensor]:
    """Each query with its response, or the response alone.

    They are as long as the longest of their batch of `batch_size`, or, with an `eos_token_id`, end
    with the first token that ends a response by the options or the model's own settings; if these
    name none, with this one.
    """
    rows, ends = [], [] if eos_token_id is None else _ends(model, options, eos_token_id)
    for start in range(0, len(queries), batch_size):
        if length_sampler is not None:
            options["max_new_tokens"] = length_sampler()
        part = queries[start : start + batch_size]
        checks.positions(_most_tokens(model, part, options), model.num_positions)
        # What stands at padding is never seen: the mask has positions begin after it.
        ids, mask = pad([query.tolist() for query in part], 0, side="left")
        device = part[0].device
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device).long(), **options
        )
        prompts = [query for query in part for _ in range(len(output) // len(part))]
        for query, row in zip(prompts, output, strict=True):
            response = _cut(row[ids.shape[1] :], ends)
            rows.append(torch.cat([query, response]) if return_prompt else response)
    return rows


def _most_tokens(
    model: AutoModelForCausalLMWithValueHead, queries: list[Tensor], options: dict
) -> int:
    """Tokens of the longest query and of the longest response that it may have."""
    longest = max(len(query) for query in queries)
    num_new = _option("max_new_tokens", model, options)
    if num_new is None:
        return max(longest + 1, _option("max_length", model, options) or 0)
    return longest + num_new


def _ends(model: AutoModelForCausalLMWithValueHead, options: dict, default: int) -> list[int]:
    """The ids that end a response. `eos_token_id=None`, or an id that no token has, ends none."""
    ids = _option("eos_token_id", model, options)
    if ids is None:
        return [] if "eos_token_id" in options else [default]
    return torch.as_tensor(ids).reshape(-1).tolist()


def _option(name: str, model: AutoModelForCausalLMWithValueHead, options: dict) -> Any:
    """What transformers goes by: an argument, then its `generation_config`, then the model's."""
    if name in options:
        return options[name]
    configs = options.get("generation_config"), model.pretrained_model.generation_config
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _cut(response: Tensor, ends: list[int]) -> Tensor:
    """The response up to the first of the tokens `ends`."""
    found = torch.isin(response, response.new_tensor(ends)).nonzero()
    return response[: found[0, 0] + 1] if len(found) else response


def respond_to_batch(
    model: AutoModelForCausalLMWithValueHead,
    queries: Tensor,
    txt_len: int = 20,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Samples `txt_len` tokens (B, txt_len), which nothing ends, after the queries (B, L)."""
    checks.positions(queries.shape[1] + txt_len, model.num_positions)
    output = model.generate(
        input_ids=queries,
        attention_mask=torch.ones_like(queries),
        do_sample=True,
        max_new_tokens=txt_len,
        top_k=top_k,
        top_p=top_p,
        temperature=1.0,
        eos_token_id=None,
    )
    return output[:, queries.shape[1] :]
