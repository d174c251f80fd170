"""The worlds of `rlhf demo`: built-in reviews, and labelled text."""
