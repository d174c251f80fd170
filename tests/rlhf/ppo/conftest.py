"""PPO's trainer."""

import pytest

from rlhf.ppo.trainer import PPOTrainer


@pytest.fixture
def make_trainer(ppo_config, tmp_path):
    def make(**changes) -> PPOTrainer:
        return PPOTrainer(ppo_config(output_dir=str(tmp_path / "run"), **changes))

    return make
