"""PPO: the loop of a run, its trainer, and the metrics of an iteration."""
