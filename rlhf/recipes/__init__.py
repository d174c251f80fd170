"""Whole experiments: a YAML file for a stage of `rlhf`, or a script."""
