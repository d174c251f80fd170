"""Scores of responses, by reward models, modules and Python functions."""
