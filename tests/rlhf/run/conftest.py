"""A run's folder, and runs of every stage."""

import pytest

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.ppo.train import train_ppo
from rlhf.ppo.trainer import PPOTrainer
from rlhf.reward_model import train_reward
from rlhf.run.checkpoints import Run, open_run
from rlhf.sft import train_sft
from rlhf.supervised import SupervisedTrainer
from tests.rlhf.helpers.stages import REWARD, Stage


@pytest.fixture
def make_config(tmp_path):
    def make(**changes) -> PPOConfig:
        defaults = {
            "model_name_or_path": "model",
            "dataset_name": "data.jsonl",
            "reward_funcs": ["reward"],
            "output_dir": str(tmp_path / "run"),
        }
        return PPOConfig(**defaults | changes)

    return make


@pytest.fixture
def run(make_config) -> Run:
    run = open_run(make_config(), "ppo")
    (run.output_dir / "metrics.jsonl").write_text("")
    return run


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory) -> dict[str, Stage]:
    """SFT and the reward model with dropout (of the GPT-2), PPO with all that adapts."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "reward.py").write_text(REWARD)
    common = {
        "output_dir": "",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.2,
        "eval_steps": 5,
        "save_steps": 4,
        "report_to": "none",
    }
    supervised = common | {
        "max_steps": 10,
        "logging_steps": 3,
        "gradient_accumulation_steps": 2,
    }

    def data(name: str) -> dict[str, str]:
        return dict.fromkeys(("dataset_name", "eval_dataset_name"), str(world / name))

    sft_config = SFTConfig(
        model_name_or_path=str(world / "gpt2"), **data("texts.jsonl"), **supervised
    )
    reward_config = RewardConfig(
        model_name_or_path=str(world / "gpt2"), **data("pairs.jsonl"), **supervised
    )
    ppo_config = PPOConfig(
        model_name_or_path=str(world / "llama"),
        **data("prompts.jsonl"),
        **common,
        reward_funcs=[str(world / "llama-reward"), f"{folder / 'reward.py'}:noise"],
        reward_weights=[1.0, 0.3],
        num_mini_batches=2,
        num_ppo_epochs=1,
        total_episodes=16 * 10,
        logging_steps=3,
        response_length=6,
        sample_response_length=True,
        score_scaling="running",
        adaptive_kl="sequence",
        target_kl=0.1,
        kl_horizon=200,
    )
    return {
        "sft": Stage(train_sft, sft_config, (SupervisedTrainer, "take_step")),
        "reward": Stage(train_reward, reward_config, (SupervisedTrainer, "take_step")),
        "ppo": Stage(train_ppo, ppo_config, (PPOTrainer, "update")),
    }


@pytest.fixture(scope="module", params=["sft", "reward", "ppo"])
def stage(request, stages) -> Stage:
    return stages[request.param]
