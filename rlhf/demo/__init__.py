"""`rlhf demo`: built-in reviews, labelled text, and two tasks with known curves."""
