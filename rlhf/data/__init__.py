"""Data sets: files and hub ids to columns, columns to token ids, token ids to batches."""
