"""Reward functions for PPO: `rlhf ppo ... --reward_funcs runs/reward examples/rewards.py:brevity`.

A function is called with whichever of `prompts`, `completions`, `completion_ids` and the data's
columns it names (`**columns` takes the rest), and gives one score for each completion.
"""


def brevity(completions, **columns):
    """Scores completions by their length, best at 12 words."""
    return [-abs(len(text.split()) - 12) / 12 for text in completions]


def brevity_of_chats(completions, **columns):
    """Scores those of conversations, where a completion is a list with one message."""
    return brevity([messages[0]["content"] for messages in completions])


def keyword(completions, keyword, **columns):
    """Scores 1 for a completion with the word of the data's column `keyword`, 0 for one without.

    None where the column is empty: there is nothing to say.
    """
    return [
        None if word is None else float(word in text)
        for text, word in zip(completions, keyword, strict=True)
    ]


def repetition(completion_ids, **columns):
    """Gives a number for each token: -0.1 for one that repeats the token before it."""
    return [
        [-0.1 * (token == before) for before, token in zip([None, *ids], ids, strict=False)]
        for ids in completion_ids
    ]
