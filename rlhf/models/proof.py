"""Proof of what the trainer assumes of a model, on a few tokens, before anything is trained.

What fails is tried on other tokens too: in a mixture of experts rounding alone can send a token to
another expert.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from rlhf.errors import UserError, one_line
from rlhf.models.generation import Decoding, cache_keyword, next_logits
from rlhf.models.passes import positions, token_values
from rlhf.run.terminal import say

ATTEMPTS = 3
LENGTH = 8  # tokens of a row
CUT = 5  # of these a prompt, as far as one is sampled from

Outputs = Callable[[Tensor, Tensor], Tensor]
Proof = Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]


def prove_causal(model: PreTrainedModel, path: str) -> None:
    """Raises UserError unless a token's logits are blind to later tokens and to padding behind."""

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    check = Check(model, path)
    check.require(sees_no_future(logits), "its logits see later tokens: give a causal model")
    check.require(ignores_padding(logits, left=0), "padding behind a row changes its logits")


def prove_policy(model: PreTrainedModel, path: str) -> Decoding:
    """Finds how to sample from the policy. Raises UserError unless a token's logits are blind to
    later tokens and to padding on both sides; says where sampling must take a slower way."""

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).logits

    check = Check(model, path)
    check.require(sees_no_future(logits), "its logits see later tokens: give a causal model")
    check.require(
        ignores_padding(logits, left=2),
        "padding before a row changes its logits, and prompts of unequal lengths are padded",
    )
    slower = f"{path}: {type(model).__name__} "
    name = cache_keyword(model)
    ways = [] if name is None else [Decoding(name), Decoding(name, masks_steps=False)]
    proven = (way for way in ways if check.holds(continues(model, logits, way, cut=False)))
    decoding = next(proven, None)
    if decoding is None:
        say(f"{slower}has no cache that gives what a whole pass gives: sampling does without")
        return Decoding(None)
    if not check.holds(continues(model, logits, decoding, cut=True)):
        say(f"{slower}cannot cut its cache: responses that have ended stay in their batch")
        return decoding._replace(drops_rows=False)
    return decoding


def prove_scorer(model: PreTrainedModel, path: str) -> None:
    """Raises UserError unless a scorer's values are blind to later tokens and to padding."""

    def values(ids: Tensor, mask: Tensor) -> Tensor:
        return token_values(model, ids, mask)[..., None]

    check = Check(model, path)
    check.require(sees_no_future(values), "its values see later tokens: give a causal model")
    check.require(ignores_padding(values, left=2), "padding before a row changes its values")


class Check:
    """Runs proofs on a model. Each is a function of token ids (2, LENGTH) that yields pairs of
    tensors which must be equal, up to rounding."""

    def __init__(self, model: PreTrainedModel, path: str):
        self.model = model
        self.path = path
        # Far below what any fault changes, far above rounding.
        self.tolerance = max(1e-4, 16 * torch.finfo(model.dtype).eps)
        self.error: Exception | None = None
        generator = torch.Generator().manual_seed(0)
        size, shape = model.get_input_embeddings().num_embeddings, (ATTEMPTS, 2, LENGTH)
        self.ids = torch.randint(size, shape, generator=generator).to(model.device)

    @torch.no_grad()
    def holds(self, proof: Proof) -> bool:
        was_training, verbosity = self.model.training, logging.get_verbosity()
        self.model.eval()
        # A model says in its first pass what it lacks to be fast.
        logging.set_verbosity_warning()
        try:
            return any(self._try(proof, ids) for ids in self.ids)
        finally:
            logging.set_verbosity(verbosity)
            self.model.train(was_training)

    def _try(self, proof: Proof, ids: Tensor) -> bool:
        self.error = None
        try:
            return all(self._equal(one, other) for one, other in proof(ids))
        except Exception as error:  # a model raises what it likes
            self.error = error
            return False

    def _equal(self, one: Tensor, other: Tensor) -> bool:
        if not (one.isfinite().all() and other.isfinite().all()):
            raise ValueError("its outputs are not finite")
        scale = one.float().std().item()
        return (one - other).abs().max().item() <= self.tolerance * scale

    def require(self, proof: Proof, reason: str) -> None:
        if not self.holds(proof):
            if self.error is not None:
                reason = f"it cannot be run, {one_line(self.error)}"
            raise UserError(f"{self.path} cannot be used, {type(self.model).__name__}: {reason}")


def sees_no_future(outputs: Outputs) -> Proof:
    def proof(ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        mask = torch.ones_like(ids, dtype=torch.bool)
        changed = ids.clone()
        changed[:, -1] = (ids[:, -1] + 1) % (ids.max() + 1)
        yield outputs(ids, mask)[:, :-1], outputs(changed, mask)[:, :-1]

    return proof


def ignores_padding(outputs: Outputs, left: int) -> Proof:
    """The first row, padded by `left` columns before it and one behind, is what it is alone."""

    def proof(ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, :left] = mask[0, -1] = False
        alone = ids[:1, left:-1]
        whole = outputs(alone, torch.ones_like(alone, dtype=torch.bool))
        yield whole, outputs(ids, mask)[:1, left:-1]

    return proof


def continues(model: PreTrainedModel, outputs: Outputs, decoding: Decoding, cut: bool) -> Proof:
    """Steps with the cache are a pass over the whole; with `cut` the second row goes on alone."""

    def proof(ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, :2] = False
        rows, places = slice(1 if cut else 0, 2), positions(mask)
        whole = outputs(ids, mask)[rows]
        start = ids[:, :CUT], mask[:, :CUT], places[:, :CUT]
        _, cache = next_logits(model, decoding, *start, None)
        if cut:
            cache.reorder_cache(torch.ones(1, dtype=torch.long, device=ids.device))
        for end in range(CUT + 1, LENGTH + 1):
            last = slice(end - 1, end)
            step = ids[rows, last], mask[rows, :end], places[rows, last]
            logits, cache = next_logits(model, decoding, *step, cache)
            yield whole[:, last], logits

    return proof
