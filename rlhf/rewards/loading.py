"""From the names of rewards, or the objects themselves, to weighted rewards."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config.fields import Options
from rlhf.config.ppo import PPOConfig
from rlhf.data.loaders import Prompts
from rlhf.errors import UserError
from rlhf.models.loading import load_reward_model, load_tokenizer
from rlhf.models.passes import default_device
from rlhf.models.proof import prove_scorer
from rlhf.rewards.functions import load_function
from rlhf.rewards.kinds import FunctionReward, ModelReward, ModuleReward
from rlhf.rewards.scoring import Reward, shorten


def load_rewards(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    reward_funcs: Sequence[str | nn.Module | Callable] | None = None,
) -> list[Reward]:
    """The rewards of `config`, or those given instead, weighted by `config.reward_weights`, as
    `make_rewards` makes them."""
    sources = config.reward_funcs if reward_funcs is None else reward_funcs
    if not sources:
        raise UserError(
            "reward_funcs must name what scores a response: the folder of a reward model, "
            "module:function or file.py:function"
        )
    weights = [1.0] * len(sources) if config.reward_weights is None else config.reward_weights
    if len(sources) != len(weights):
        raise UserError(
            f"reward_weights must have one weight for each of {len(sources)} reward_funcs, got "
            f"{weights}"
        )
    return make_rewards(sources, weights, tokenizer, config)


def make_rewards(
    sources: Sequence[str | nn.Module | Callable],
    weights: list[float],
    tokenizer: PreTrainedTokenizerBase,
    config: Options,
) -> list[Reward]:
    """The rewards that the sources stand for, with these weights; `tokenizer` is the policy's.

    A string is the folder or hub id of a reward model, `module:function` (the current folder
    counts) or `file.py:function`. A sequence classifier with one label is a reward model with the
    policy's tokenizer, any other nn.Module a ModuleReward.
    """
    found = [_find(source) for source in sources]
    names = _make_unique([_name(source) for source in found])
    return [
        _make_reward(*entry, tokenizer, config) for entry in zip(names, weights, found, strict=True)
    ]


def for_tokenizer(rewards: list[Reward], tokenizer: PreTrainedTokenizerBase) -> list[Reward]:
    """The same rewards, for the responses of another policy, in its tokenizer's tokens."""
    return [
        replace(reward, policy_tokenizer=tokenizer) if isinstance(reward, ModelReward) else reward
        for reward in rewards
    ]


def critic_path(rewards: list[Reward]) -> str | None:
    """Folder or hub id of the first reward model with the policy's vocabulary, if there is one."""
    models = [reward for reward in rewards if isinstance(reward, ModelReward)]
    return next((model.path for model in models if model.shares_vocabulary and model.path), None)


def check_rewards(rewards: list[Reward], prompts: Prompts, longest: int) -> None:
    """Raises UserError if a reward cannot score responses to `prompts`: a function that needs an
    argument which the data lacks, a reward model without chat template or with fewer positions than
    `longest`, the most tokens of prompt and response."""
    for reward in rewards:
        reward.check(prompts, longest)


def _find(source: str | nn.Module | Callable) -> str | nn.Module | Callable:
    """The function that the string names; a reward model's path, or an object, is left as is."""
    if isinstance(source, str) and ":" in source and not Path(source).is_dir():
        source = load_function(source)
    elif isinstance(source, str) and Path(source).is_file():
        raise UserError(
            f"reward {source} is a file: give a reward model's folder, or file.py:function"
        )
    if isinstance(source, str):
        return source
    if not callable(source) or isinstance(source, type):
        raise UserError(
            f"a reward must be a function, an nn.Module or a reward model, got "
            f"{shorten(repr(source))}"
        )
    return source


def _name(source: str | nn.Module | Callable) -> str:
    if isinstance(source, str):
        return Path(source).resolve().name
    return getattr(source, "__name__", type(source).__name__)


def _make_unique(names: list[str]) -> list[str]:
    """Names in which each that came before gets a number: score, score_2, score_3."""
    unique = []
    for name in names:
        candidates = chain([name], (f"{name}_{n}" for n in count(2)))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique


def _make_reward(
    name: str,
    weight: float,
    source: str | nn.Module | Callable,
    tokenizer: PreTrainedTokenizerBase,
    config: Options,
) -> Reward:
    if isinstance(source, str):
        own = load_tokenizer(source, config)
        model = load_reward_model(source, config).eval()
        prove_scorer(model, source)
        return ModelReward(name, weight, model, own, tokenizer, source, config)
    if not isinstance(source, nn.Module):
        return FunctionReward(name, weight, source)
    module = source.to(default_device()).eval()
    is_scorer = isinstance(module, PreTrainedModel) and hasattr(module, "score")
    if is_scorer and module.config.num_labels == 1:
        return ModelReward(name, weight, module, tokenizer, tokenizer, None, config)
    return ModuleReward(name, weight, module, config)
