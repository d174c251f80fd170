"""What the classic API refuses, in one line."""

import math

import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from rlhf import classic
from rlhf.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf.errors import UserError
from tests.rlhf.helpers.classic_peer import make_model, make_tokenizer
from tests.rlhf.helpers.classic_trainer import GOOD, make_trainer, rows, weights

# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 6, "mini_batch_size": 4},
            r"batch_size must be a multiple .* 4 \* 1, got 6",
        ),
        ({"mini_batch_size": 0}, "mini_batch_size must be an integer >= 1, got 0"),
        ({"kl_penalty": "k3"}, "kl_penalty must be one of .*'full'.*, got 'k3'"),
        ({"log_with": "mlflow"}, "log_with must be one of .*'wandb'.*, got 'mlflow'"),
        ({"log_with": "wandb"}, "log_with 'wandb' needs wandb: pip install wandb"),
        ({"temperature": 0.0}, "temperature must be a number > 0, got 0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number > 0 or None, got 0.0"),
        ({"gamma": 1.5}, r"gamma must be a number in \[0, 1\], got 1.5"),
        ({"learning_rate": "1e-5"}, "learning_rate must be a number >= 0 and finite, got '1e-5'"),
        ({"learning_rate": None}, "learning_rate must be a number >= 0 and finite, got None"),
        ({"score_clip": "2"}, "score_clip must be a number > 0 or None, got '2'"),
        ({"target_kl": None}, "target_kl must be a number > 0, got None"),
        ({"horizon": 10.0}, "horizon must be more than a fifth of batch_size 128.* got 10.0"),
        ({"world_size": 2}, "world_size must be left out: .* one process.*, got 2"),
        ({"is_peft_model": True}, "is_peft_model must be left out"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, "must hold repo_id, got"),
    ],
)
def test_config_is_checked(changes, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # wandb's
    with pytest.raises(UserError, match=message) as error:
        PPOConfig(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.ones(4, 2)}, "queries must be a list of tensors, got Tensor"),
        (
            {"responses": GOOD["responses"][:3]},
            "responses must have batch_size = 4 elements, got 3",
        ),
        ({"scores": [1.0, 2.0, 3.0, 4.0]}, r"scores\[0\] must be a tensor, got float"),
        ({"queries": [*GOOD["queries"][:3], [3]]}, r"queries\[3\] must be a tensor, got list"),
        ({"queries": [x[None] for x in GOOD["queries"]]}, r"queries\[0\] must be 1-D, got shape"),
        (
            {"queries": [x.float() for x in GOOD["queries"]]},
            "int64 or int32 token ids, got torch.f",
        ),
        ({"responses": rows([[], [3], [3], [3]])}, r"responses\[0\] must hold int64"),
        (
            {"responses": [x[:0] for x in GOOD["responses"]]},
            r"responses\[0\] must have at least one",
        ),
        ({"responses": rows([[11], [3], [3], [3]])}, r"ids in \[0, 11\), .*, got 11"),
        ({"queries": rows([[-1], [3], [3], [3]])}, r"ids in \[0, 11\), .*, got -1"),
        ({"responses": [torch.full((33,), 3)] * 4}, r"fit the model's 32 positions, got 38 tokens"),
        ({"scores": [torch.ones(2)] * 4}, r"scores\[0\] must be a single number, got shape \(2,\)"),
        ({"scores": [torch.ones(1, 1)] * 4}, r"scores\[0\] must be a single number"),
        ({"scores": rows([1.0, math.nan, 0.0, 0.0])}, r"scores\[1\] must be finite, got nan"),
        (
            {"response_masks": rows([[1]])},
            "response_masks must have batch_size = 4 elements, got 1",
        ),
        ({"response_masks": rows([[1]] * 4)}, r"response_masks\[0\] must have shape \(5,\)"),
        (
            {"response_masks": [x * 0 for x in GOOD["responses"]]},
            r"response_masks\[0\] must count at least one token, got none",
        ),
    ],
)
def test_step_is_checked(changes, message):
    trainer = make_trainer()
    before = weights(trainer)
    with pytest.raises(UserError, match=message) as error:
        trainer.step(**GOOD | changes)
    assert "\n" not in str(error.value)
    assert torch.equal(weights(trainer), before)


def test_step_without_gradients_is_refused():
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(UserError, match=r"call it outside of torch.no_grad\(\)"):
            make_trainer().step(**GOOD)


def test_scores_of_one_element_are_numbers():
    stats = make_trainer().step(**GOOD | {"scores": [torch.ones(1)] * 4})
    assert stats["ppo/mean_scores"] == 1.0


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1])


def test_trainer_is_checked(monkeypatch):
    model, tokenizer, config = make_model(classic, 0.0), make_tokenizer(), PPOConfig()
    other, frozen = make_model(classic, 0.5), make_model(classic, 0.5).requires_grad_(False)
    for arguments, message in (
        (({}, model, None, tokenizer), "config must be of type rlhf.PPOConfig, got dict"),
        (
            (config, model.pretrained_model, None, tokenizer),
            "model must be of type rlhf.AutoModelForCausalLMWith",
        ),
        (
            (config, model, model.pretrained_model, tokenizer),
            "ref_model must be of type rlhf.AutoModelFor",
        ),
        ((config, model, None, None), "tokenizer must be of type transformers.Pre.*, got NoneType"),
        (
            (config, model, None, tokenizer, [1]),
            "of type torch.Dataset or datasets.Dataset, got list",
        ),
        (
            (config, model, None, tokenizer, Dataset.from_dict({"query": ["a"]})),
            "dataset must have at least batch_size = 128 rows, got 1",
        ),
        (
            (config, model, None, tokenizer, Stream()),
            "dataset must give rows by their index, got an IterableDataset",
        ),
        (
            (config, model, None, PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)),
            "tokenizer must have an EOS token, it has none: set one",
        ),
        (
            (config, model, model, tokenizer),
            "ref_model must be a model of its own, .* leave it out for a frozen copy",
        ),
        (
            (config, model, AutoModelForCausalLMWithValueHead(model.pretrained_model), tokenizer),
            "ref_model must be a model of its own, .* leave it out for a frozen copy",
        ),
        (
            (config, frozen, None, tokenizer),
            "model must have parameters that require a gradient, got none",
        ),
        (
            (config, model, None, tokenizer, None, torch.optim.SGD(other.parameters(), lr=1.0)),
            "optimizer must hold parameters of the model that require a gradient, got none",
        ),
    ):
        with pytest.raises(UserError, match=message):
            PPOTrainer(*arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.setattr("rlhf.distributed.world_size", lambda: 2)
    with pytest.raises(
        UserError, match="PPOTrainer runs in one process: start it without torchrun"
    ):
        PPOTrainer(config, model, None, tokenizer)
