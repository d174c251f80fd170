"""A small call of every public function, told by what is differentiable and what is constant."""

from typing import NamedTuple

import torch

import ppo_kernels
from ppo_kernels import objectives
from tests.conftest import loss_inputs


class Call(NamedTuple):
    function: object
    differentiable: dict
    constants: dict
    numbers: dict
    takes_backend: bool = True

    def __call__(self, backend="auto", **changed):
        arguments = self.differentiable | self.constants | self.numbers | changed
        return self.function(**arguments, **({"backend": backend} if self.takes_backend else {}))

    def results_and_gradients(self, backend="auto", **changed):
        """Detached results, and gradients of their sum in the differentiable arguments."""
        leaves = {
            name: x.detach().clone().requires_grad_() for name, x in self.differentiable.items()
        }
        # What is written in place must be no leaf that requires grad.
        results = self(backend, **{name: x * 1 for name, x in leaves.items()}, **changed)
        results = results if isinstance(results, tuple) else (results,)
        sums = [x.sum() for x in results if x.requires_grad]
        if sums:
            sum(sums).backward()
        return [x.detach() for x in results], [x.grad for x in leaves.values()]


def calls(batch=2, length=3, vocabulary=11):
    """Name -> Call."""
    torch.manual_seed(0)
    inputs = loss_inputs(batch, length, vocabulary)
    loss = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    logits, mask = loss["logits"], loss["mask"]
    tokens, temperature = loss["tokens"], 0.5 + torch.rand(batch, length)
    x, y, z = torch.randn(3, batch, length)
    uniforms = torch.rand(batch, length)
    head = {"weight": torch.randn(vocabulary, 5), "bias": torch.randn(vocabulary)}
    head = {"hidden": torch.randn(batch, length, 5), **head}
    scored = {"tokens": tokens, "temperature": temperature}
    logprobs = {"logprobs": loss["old_logprobs"] + 0.1}
    old = {name: loss[name] for name in ("old_logprobs", "advantages", "mask")}
    of_loss = {**scored, **old, "ref_logprobs": loss["ref_logprobs"]}
    coefs = {"entropy_coef": 0.1, "kl_coef": 0.2, "denominator": 5}
    estimator, decay = {"estimator": "k3"}, {"gamma": 0.9, "lam": 0.8}
    rows = {"rewards": x, "values": y, "mask": mask, "dones": ~mask, "bootstrap_values": z[:, 0]}
    ends = torch.arange(batch + 1) * length
    ends[1:-1] -= 1
    packed = {k: x.flatten() for k, x in rows.items()} | {"cu_seqlens": ends}
    kept = {"kept_ids": tokens.flatten(), "kept_offsets": torch.arange(batch * length + 1)}
    returns = {"old_values": y, "returns": z, "mask": mask}
    op = ppo_kernels
    table = {
        "token_logprobs": (op.token_logprobs, {"logits": logits}, scored, {}),
        "token_logprobs_and_entropy": (
            *(op.token_logprobs_and_entropy, {"logits": logits}, scored, {}),
        ),
        "token_statistics": (op.token_statistics, {}, {"logits": logits, **scored}, {}),
        "kl_divergence": (
            op.kl_divergence,
            {"logits": logits},
            {"ref_logits": logits.flip(-1), "temperature": temperature},
            {},
        ),
        "kl_estimate": (op.kl_estimate, {**logprobs, "ref_logprobs": x}, {}, estimator),
        "linear_token_logprobs": (op.linear_token_logprobs, head, scored, {"chunk_bytes": 100}),
        "linear_token_logprobs_and_entropy": (
            *(op.linear_token_logprobs_and_entropy, head, scored, {"softcap": 3.0}),
        ),
        "linear_ppo_loss": (op.linear_ppo_loss, head, of_loss, coefs),
        "ppo_loss": (op.ppo_loss, {"logits": logits}, of_loss, coefs),
        "ppo_loss_": (op.ppo_loss_, {"logits": logits}, of_loss, coefs),
        "clipped_policy_loss": (op.clipped_policy_loss, logprobs, old, {"denominator": 5}),
        "value_loss": (op.value_loss, {"values": x}, returns, {"clip": 0.2}),
        "masked_mean": (op.masked_mean, {"x": x}, {"mask": mask}, {}),
        "masked_whiten": (op.masked_whiten, {}, {"x": x, "mask": mask}, {}),
        "gae": (op.gae, {}, rows, decay),
        "gae_packed": (op.gae_packed, {}, packed, decay),
        "vtrace": (op.vtrace, {}, {"log_rhos": z, **rows}, decay),
        "sample_tokens": (
            op.sample_tokens,
            {},
            {"logits": logits, "uniforms": uniforms, "mask": mask},
            {"top_k": 3, "top_p": 0.9, "min_p": 0.05},
        ),
        "kept_token_logprobs_and_entropy": (
            *(op.kept_token_logprobs_and_entropy, {"logits": logits}, scored | kept, {}, False),
        ),
    }
    for name, objective in objectives.OBJECTIVES.items():
        rollout = {"rollout_logprobs": y} if name == "tis" else {}
        table[f"objectives.{name}"] = (objective, logprobs, old | rollout, {}, False)
    for name, aggregate in objectives.AGGREGATIONS.items():
        length = {"length": 4} if name == "fixed_length_mean" else {}
        table[f"objectives.{name}"] = (aggregate, {"x": x}, {"mask": mask}, length, False)
    return {name: Call(*call) for name, call in table.items()}


NAMES = tuple(calls())
