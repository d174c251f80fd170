"""What people read: the page of a run with its charts, the model card, `rlhf env`."""
