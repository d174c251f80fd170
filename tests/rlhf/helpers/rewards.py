"""Rewards, and errors of theirs."""

import re

import pytest
import torch
from torch import nn

from rlhf.data.loaders import Prompts
from rlhf.errors import UserError
from tests.rlhf.helpers.world import EOS

PROMPTS = ("film is", "plot", "film is good", "plot is")
# "good .", "bad", "fine great .", "dull .", of which the second and the last were cut.
RESPONSES = ([7, 6, EOS], [10], [8, 9, 6, EOS], [11, 6])
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def write(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def assert_user_error(pattern: str, function, *args, **kwargs) -> UserError:
    """The whole of the message, which is one line, matches."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert re.fullmatch(pattern, message), message
    return caught.value


def length(completions):
    return [float(len(text.split())) for text in completions]


def data(prompts=PROMPTS, /, **columns) -> Prompts:
    return Prompts([[3]] * len(prompts), list(prompts), columns)


class Module(nn.Module):
    """Sums the ids of real tokens, in dropout if it trains."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)

    def forward(self, input_ids, attention_mask):
        assert input_ids.shape[0] <= 3 and not torch.is_grad_enabled()
        assert attention_mask.dtype == torch.long
        scores = self.dropout((input_ids * attention_mask).float()).sum(1) * self.scale
        return self.shape(scores)
