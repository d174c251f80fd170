"""Saved policies: their answers to prompts, and how two of them compare."""
