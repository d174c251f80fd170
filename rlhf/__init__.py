"""RLHF from end to end: supervised fine-tuning, a reward model, and PPO."""
