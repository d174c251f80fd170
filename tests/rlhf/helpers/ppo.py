"""An iteration of PPO."""

from rlhf.ppo.metrics import Batch
from rlhf.ppo.trainer import PPOTrainer


def collect(trainer: PPOTrainer) -> Batch:
    rows = trainer.next_rows()
    return trainer.evaluate(rows, trainer.sample(trainer.prompts, rows, trainer.generator))
