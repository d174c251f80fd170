"""Sampling through transformers' `generate`."""

from collections.abc import Callable

from torch import Tensor

from rlhf.batches import pad
from rlhf.classic.model import AutoModelForCausalLMWithValueHead


def generate_rows(
    model: AutoModelForCausalLMWithValueHead,
    queries: list[Tensor],
    batch_size: int,
    length_sampler: Callable[[], int] | None,
    **generation_kwargs,
) -> list[Tensor]:
    """Each query with its response, as long as the longest of its batch of `batch_size`."""
    rows = []
    for start in range(0, len(queries), batch_size):
        if length_sampler is not None:
            generation_kwargs["max_new_tokens"] = length_sampler()
        part = queries[start : start + batch_size]
        # What stands at padding is never seen: the mask has positions begin after it.
        ids, mask = pad([query.tolist() for query in part], 0, side="left")
        output = model.generate(
            input_ids=ids.to(part[0].device),
            attention_mask=mask.to(part[0].device).long(),
            **generation_kwargs,
        )
        rows += [row[ids.shape[1] - len(query) :] for row, query in zip(output, part, strict=True)]
    return rows


def cut(row: Tensor, num_prompt_tokens: int, eos_token_id: int) -> Tensor:
    """The row up to the first EOS after the prompt."""
    ends = (row[num_prompt_tokens:] == eos_token_id).nonzero()
    return row[: num_prompt_tokens + ends[0, 0] + 1] if len(ends) else row
