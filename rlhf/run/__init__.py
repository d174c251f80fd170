"""A run's output folder, checkpoints, metrics and progress, and how it ends and goes on."""
