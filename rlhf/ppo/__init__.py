"""PPO: the loop of a run, its trainer, the advantages and the metrics of an iteration."""
