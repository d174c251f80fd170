"""Tokenizers with and without a chat template, which have a character for a token."""

import pytest

from tests.rlhf.helpers.rows import CHATML, LLAMA2, characters


@pytest.fixture(scope="module")
def plain():
    """Without a chat template; it writes BOS."""
    return characters(None, "</s>", adds_bos=True)


@pytest.fixture(scope="module")
def chatml():
    return characters(CHATML, "<|im_end|>", adds_bos=False)


@pytest.fixture(scope="module")
def llama2():
    return characters(LLAMA2, "</s>", adds_bos=True)
