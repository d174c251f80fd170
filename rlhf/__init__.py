"""RLHF from end to end: supervised fine-tuning, a reward model, and PPO.

Each public name is imported from its module when it is asked for: `import rlhf` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.config.ppo import PPOConfig
    from rlhf.config.training import RewardConfig, SFTConfig
    from rlhf.errors import UserError
    from rlhf.ppo.train import train_ppo
    from rlhf.reward_model import train_reward
    from rlhf.sft import train_sft

# Public name -> the module that has it.
_MODULES = {
    "train_sft": "rlhf.sft",
    "train_reward": "rlhf.reward_model",
    "train_ppo": "rlhf.ppo.train",
    "SFTConfig": "rlhf.config.training",
    "RewardConfig": "rlhf.config.training",
    "PPOConfig": "rlhf.config.ppo",
    "UserError": "rlhf.errors",
}
__all__ = [
    "PPOConfig",
    "RewardConfig",
    "SFTConfig",
    "UserError",
    "train_ppo",
    "train_reward",
    "train_sft",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        from rlhf.errors import of_the_extra

        raise of_the_extra(error) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
