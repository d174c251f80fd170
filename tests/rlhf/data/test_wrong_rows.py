"""Rows that cannot be learnt from or answered are named in one line."""

import json

import pytest

from rlhf.errors import UserError
from tests.rlhf.helpers.rows import assistant, fails, prompts, rankings, texts, user


@pytest.mark.parametrize(
    ("load", "rows", "parts"),
    [
        (texts, [{"a": "b"}], ("must have the columns prompt and completion", "it has ['a']")),
        (texts, [{"prompt": "b"}], ("or messages, or text", "['prompt']: rename or add")),
        (rankings, [{"prompt": "a", "chosen": "b"}], ("prompt and ranking", "it has ['prompt', ")),
        (prompts, [{"completion": "a"}], ("prompt, or messages, or text; it has ['completion']",)),
        (texts, [{"text": "a"}, {"text": 1}], ("row 2: text must be a string, got 1",)),
        (texts, [{"text": [user("a")]}], ("row 1: text must be a string", "and never in text)")),
        (texts, [{"text": None}], ("row 1: text must be a string, got None",)),
        (prompts, [{"prompt": "a"}, {"n": 1}], ("row 2: prompt must be a string, got None",)),
        (texts, [{"messages": [user("a")]}], ("data.jsonl", "within max_length 1024: raise it")),
        (texts, [{"messages": "a"}], ("row 1: messages must be a list of messages, got 'a'",)),
        (texts, [{"messages": []}], ("row 1: messages must be a list of messages, got []",)),
        (
            texts,
            [{"messages": [{"role": "user"}]}],
            ("row 1: messages must hold", "role and content, got {'role': 'user'}"),
        ),
        (
            prompts,
            [{"prompt": [user("a")]}, {"prompt": [{"from": "human", "value": "b"}]}],
            ("row 2: prompt must hold messages with the strings role and content",),
        ),
        (prompts, [{"prompt": [user("a")]}, {"prompt": ["b"]}], ("row 2", "got 'b'")),
        (
            texts,
            [{"prompt": [user("a")], "completion": "b"}],
            ("row 1: completion must be a list of messages, got 'b'", "in all rows and columns"),
        ),
        (
            texts,
            [{"prompt": "a", "completion": [assistant("b")]}],
            ("row 1: completion must be a string", "in all rows and columns or in none"),
        ),
        (
            prompts,
            [{"prompt": "a"}, {"prompt": [user("b")]}],
            ("row 2: prompt must be a string", "in all rows and columns or in none"),
        ),
        (
            rankings,
            [{"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}],
            ("row 1: an answer must be a string, got [{",),
        ),
        (rankings, [{"prompt": "a", "ranking": ["b"]}], ("row 1: ranking", "at least 2", "['b']")),
        (rankings, [{"prompt": "a", "ranking": "bc"}], ("row 1: ranking", "got 'bc'")),
        (
            rankings,
            [{"prompt": "a", "ranking": ["b", "c"]}, {"prompt": "a", "ranking": ["b", 2]}],
            ("row 2: an answer must be a string, got 2",),
        ),
        (rankings, [{"prompt": "a", "chosen": "b", "rejected": None}], ("row 1", "got None")),
        (prompts, [{"text": "a"}], ("no text has the 2 tokens", "text_prompt_length")),
        (prompts, [{"messages": [assistant("a")]}], ("row 1: messages must hold more",)),
        (texts, [{"messages": [assistant("a"), user("b")]}], ("row 1", "begin with a system or")),
    ],
)
def test_a_wrong_row_is_named(llama2, save, load, rows, parts):
    path = save(*rows)
    fails(lambda: load(path, llama2), path, *parts)


@pytest.mark.parametrize(
    ("load", "row", "what"),
    [
        (texts, {"text": "a\ud83d"}, "text"),
        (texts, {"prompt": "a", "completion": "a\ud83d"}, "completion"),
        (texts, {"messages": [user("a"), assistant("a\ud83d")]}, "the messages"),
        (rankings, {"prompt": "a", "ranking": ["b", "a\ud83d"]}, "an answer"),
        (rankings, {"chosen": [user("a")], "rejected": [user("a\ud83d")]}, "the messages"),
        (prompts, {"prompt": "a\ud83d"}, "prompt"),
        (prompts, {"prompt": [user("a\ud83d")]}, "the messages"),
    ],
)
def test_half_a_surrogate_pair_is_named(llama2, tmp_path, load, row, what):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))  # which writes an escape
    fails(lambda: load(str(path), llama2), f"row 1: {what} must be valid Unicode, got '", "\\ud83d")


@pytest.mark.parametrize(
    ("load", "row"),
    [
        (texts, {"text": 3}),
        (texts, {"messages": []}),
        (texts, {"prompt": "a", "completion": None}),
        (prompts, {"prompt": 3}),
    ],
)
def test_of_messages_nothing_is_said_where_there_are_none(plain, save, load, row):
    path = save(row)
    with pytest.raises(UserError, match=r"must be a .*, got (3|None|\[\])$"):
        load(path, plain)


@pytest.mark.parametrize(
    ("load", "row"),
    [
        (texts, {"messages": [user("a"), assistant("b")]}),
        (texts, {"prompt": [user("a")], "completion": [assistant("b")]}),
        (rankings, {"chosen": [assistant("a")], "rejected": [assistant("b")]}),
        (prompts, {"prompt": [user("a")]}),
        (prompts, {"messages": [user("a")]}),
    ],
)
def test_messages_need_a_chat_template(plain, save, load, row):
    path = save(row)
    fails(
        lambda: load(path, plain),
        path,
        "no chat template",
        "set tokenizer.chat_template",
        "plain strings",
    )


@pytest.mark.parametrize(
    ("load", "columns"),
    [
        (texts, ("messages",)),
        (rankings, ("chosen", "rejected")),
        (prompts, ("prompt",)),
    ],
)
def test_what_the_chat_template_refuses_is_named(llama2, save, load, columns):
    good, bad = [user("a"), assistant("b")], [{"role": "tool", "content": "b"}, assistant("a")]
    path = save(dict.fromkeys(columns, good), dict.fromkeys(columns, bad))
    fails(lambda: load(path, llama2), "row 2", "Only user and assistant roles are supported!")
