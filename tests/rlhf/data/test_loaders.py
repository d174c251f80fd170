"""Every format of a row: what is learnt, ranked and prompted with.

The tokenizer has a token for each character and for each special token, so that expected ids are
written as text: "<s>ab" is three tokens.
"""

import random
import re
from collections import Counter

import torch

from rlhf.data.loaders import Text, prompt_ids
from rlhf.demo.base import train_tokenizer
from rlhf.models.loading import load_causal_lm
from rlhf.sft import count_learnt, token_loss
from tests.rlhf.helpers.rows import (
    CHATML,
    VOCABULARY,
    assistant,
    characters,
    prompts,
    rankings,
    texts,
    user,
)

# Marks what is learnt, and writes an earlier answer otherwise than the last.
MARKED = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "a: {% generation %}"
    "{{ message['content'] if loop.last else '!' }}</s>"
    "{% endgeneration %}"
    "{% else %}u: {{ message['content'] }} {% endif %}"
    "{% endfor %}"
)


def ids(text: str) -> list[int]:
    return [VOCABULARY[token] for token in re.findall(r"<s>|</s>|<\|\w+\|>|[\s\S]", text)]


def learnt(text: Text, tokenizer) -> str:
    """What is learnt of a text, with | between the spans."""
    tokens = tokenizer.convert_ids_to_tokens(text.ids)
    marked = "".join(
        token if flag else "\0" for token, flag in zip(tokens, text.learnt, strict=True)
    )
    return "|".join(filter(None, marked.split("\0")))


# SFT


def test_text_is_learnt_whole_and_ends_with_eos(plain, chatml, save):
    path = save({"text": "ab"}, {"text": "c"}, {"text": "d</s>"})
    assert texts(path, plain) == [
        Text(ids("<s>ab</s>"), [False, True, True, True]),
        Text(ids("<s>c</s>"), [False, True, True]),
        Text(ids("<s>d</s>"), [False, True, True]),
    ]
    assert [text.ids for text in texts(path, plain, max_length=3)] == [
        ids("<s>ab"),
        ids("<s>c</s>"),
        ids("<s>d</s>"),
    ]
    # Without BOS the first token has nothing to be learnt from.
    assert texts(path, chatml)[0] == Text(ids("ab<|im_end|>"), [False, True, True])


def test_of_prompt_and_completion_the_completion_is_learnt(plain, save):
    path = save({"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": "d"})
    assert texts(path, plain) == [
        Text(ids("<s>abc</s>"), [False, False, False, True, True]),
        Text(ids("<s>d</s>"), [False, True, True]),
    ]
    # Of the first row nothing is left to learn.
    assert texts(path, plain, max_length=3) == [Text(ids("<s>d</s>"), [False, True, True])]


def test_how_many_rows_hold_nothing_to_learn_is_told(plain, save, capsys, monkeypatch):
    path = save({"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": "d"})
    texts(path, plain)
    assert capsys.readouterr().out == ""
    texts(path, plain, max_length=3)
    line = f"{path}: 1 of 2 rows hold nothing to learn within max_length 3 and are left out\n"
    assert capsys.readouterr().out == line
    monkeypatch.setenv("RANK", "1")
    texts(path, plain, max_length=3)
    assert capsys.readouterr().out == ""


def test_chatml_of_messages_all_that_the_assistant_says_is_learnt(chatml, save):
    messages = [user("hi"), assistant("yo"), user("b"), assistant("c")]
    (text,) = texts(save({"messages": [{"role": "system", "content": "s"}, *messages]}), chatml)
    assert text.ids == ids(
        "<|im_start|>system\ns<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>"  # A response ends here, and not with a line break.
    )
    assert learnt(text, chatml) == "yo<|im_end|>|c<|im_end|>"
    # A user's last message is no answer to learn.
    (text,) = texts(save({"messages": messages[:3]}), chatml)
    assert text.ids[-3:] == ids("yo<|im_end|>")
    assert learnt(text, chatml) == "yo<|im_end|>"


def test_llama2_of_messages_all_that_the_assistant_says_is_learnt(llama2, save):
    messages = [user("hi"), assistant("yo"), user("b"), assistant("c")]
    (text,) = texts(save({"messages": messages}), llama2)
    # One BOS at the beginning, that of the template, though the tokenizer writes one too.
    assert text.ids == ids("<s>[INST] hi [/INST] yo </s><s>[INST] b [/INST] c </s>")
    assert learnt(text, llama2) == " yo </s>| c </s>"


def test_what_the_template_marks_as_generation_is_learnt(save):
    tokenizer = characters(MARKED, "</s>", adds_bos=False)
    (text,) = texts(
        save({"messages": [user("b"), assistant("c"), user("d"), assistant("e")]}), tokenizer
    )
    assert text.ids == [VOCABULARY.get(c, VOCABULARY["?"]) for c in "u: b a: !"] + ids("</s>") + [
        VOCABULARY.get(c, VOCABULARY["?"]) for c in "u: d a: e"
    ] + ids("</s>")
    assert learnt(text, tokenizer) == "!</s>|e</s>"


def test_conversational_completion_is_learnt(chatml, llama2, save):
    path = save({"prompt": [user("hi")], "completion": [assistant("yo")], "messages": "unused"})
    (text,) = texts(path, chatml)
    assert text.ids == ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>")
    assert learnt(text, chatml) == "yo<|im_end|>"
    (text,) = texts(path, llama2)
    assert text.ids == ids("<s>[INST] hi [/INST] yo </s>")
    assert learnt(text, llama2) == " yo </s>"


def test_eos_is_appended_to_a_chat_without_it(save):
    template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    tokenizer = characters(template, "</s>", adds_bos=False)
    path = save({"messages": [user("</s>a"), assistant("b")]})
    (text,) = texts(path, tokenizer)
    assert text.ids == ids("</s>a\nb\n</s>")
    assert learnt(text, tokenizer) == "b\n</s>"


def test_a_token_that_grew_over_the_start_of_an_answer_is_learnt(save):
    tokenizer = train_tokenizer(["a\n\n\nb"] * 9, 300)
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "").replace("<|im_end|>", "")
    (text,) = texts(save({"messages": [user("b"), assistant("\n\nc")]}), tokenizer)
    tokens = [tokenizer.decode([i]) for i, flag in zip(*text, strict=True) if flag]
    # The prompt keeps its last token, with which a policy is prompted: no "\n\n" over the seam.
    assert tokens == ["\n", "\n", "c", "\n", "<eos>"]


def test_chats_are_cut_at_max_length(chatml, save):
    path = save({"messages": [user("a"), assistant("bcd")]})
    (whole,) = texts(path, chatml)
    (cut,) = texts(path, chatml, max_length=len(whole.ids) - 2)
    assert cut.ids == whole.ids[:-2]
    assert learnt(cut, chatml) == "bc"


def test_only_learnt_tokens_count_in_the_loss(world):
    model = load_causal_lm(str(world / "gpt2")).eval()
    learnt = [False, False, True, True, False, True]
    batch = [Text([3, 5, 7, 6, 4, 2], learnt), Text([4, 5, 2], [False, True, True])]
    assert count_learnt(batch) == 5
    total = 0
    for text in batch:
        logprobs = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        for position, flag in enumerate(text.learnt):
            if flag:
                total -= logprobs[position - 1, text.ids[position]]
    torch.testing.assert_close(token_loss(model, batch, 0, 5), total / 5)


# Rankings


def test_rankings_hold_the_prompt_and_each_answer(plain, save):
    path = save({"prompt": "a", "ranking": ["b", "cd", ""]}, {"prompt": "", "ranking": ["e", "f"]})
    assert rankings(path, plain) == [
        [ids("<s>ab</s>"), ids("<s>acd</s>"), ids("<s>a</s>")],
        [ids("<s>e</s>"), ids("<s>f</s>")],
    ]
    assert rankings(path, plain, append_eos=False, max_length=2) == [
        [ids("<s>b"), ids("<s>d"), ids("<s>a")],
        [ids("<s>e"), ids("<s>f")],
    ]


def test_chosen_and_rejected_are_a_ranking_of_two(plain, save):
    path = save({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert rankings(path, plain) == [[ids("<s>ab</s>"), ids("<s>ac</s>")]]


def test_chosen_and_rejected_may_hold_their_prompt(plain, chatml, save):
    path = save({"chosen": "ab", "rejected": "ac"})
    assert rankings(path, plain) == [[ids("<s>ab</s>"), ids("<s>ac</s>")]]
    assert rankings(path, chatml) == [[ids("ab<|im_end|>"), ids("ac<|im_end|>")]]


def test_conversational_rankings(chatml, llama2, save):
    expected = [
        ids(f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>")
        for answer in "bc"
    ]
    prompt, chosen, rejected = [user("hi")], [assistant("b")], [assistant("c")]
    for row in (
        {"prompt": prompt, "ranking": [chosen, rejected]},
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"chosen": prompt + chosen, "rejected": prompt + rejected},
    ):
        path = save(row)
        # EOS is where the score of a response is read, so the line break after it goes.
        assert rankings(path, chatml) == [expected]
        as_written = [answer + ids("\n") for answer in expected]
        assert rankings(path, chatml, append_eos=False) == [as_written]
        assert rankings(path, llama2) == [
            [ids(f"<s>[INST] hi [/INST] {answer} </s>") for answer in "bc"]
        ]
        assert rankings(path, llama2, max_length=4)[0][0] == ids("<s>b </s>")


# Prompts


def test_prompts_bring_the_other_columns(plain, save):
    path = save({"prompt": "ab", "chosen": "x", "n": 1}, {"prompt": "", "chosen": "y", "n": None})
    assert prompts(path, plain) == (
        [ids("<s>ab"), ids("<s>")],
        ["ab", ""],
        {"chosen": ["x", "y"], "n": [1, None]},
    )
    assert prompts(path, plain, max_prompt_length=1).ids == [ids("b"), ids("<s>")]


def test_conversational_prompts_end_where_the_assistant_begins(chatml, llama2, save):
    chat = [user("hi"), assistant("yo"), user("b")]
    path = save({"prompt": chat})
    expected = (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts(path, chatml) == ([ids(expected)], [chat], {})
    assert prompts(path, chatml, max_prompt_length=5).ids == [ids("tant\n")]
    assert prompts(path, llama2).ids == [ids("<s>[INST] hi [/INST] yo </s><s>[INST] b [/INST]")]

    messages = [*chat, assistant("c")]
    path = save({"messages": messages, "label": 1}, {"messages": chat, "label": 2})
    assert prompts(path, chatml) == (
        [ids(expected)] * 2,
        [chat, chat],
        {"messages": [messages, chat], "label": [1, 2]},
    )


def test_prompts_are_drawn_from_the_beginnings_of_texts(plain, chatml, save):
    rows = [{"text": "abcdefgh"[: 1 + i % 8], "row": i} for i in range(200)]
    path = save(*rows)
    found = prompts(path, plain, text_prompt_length=[2, 4], seed=3)
    rng = random.Random(3)
    draws = [rng.randint(2, 4) for _ in rows]
    kept = [(row, draw) for row, draw in zip(rows, draws, strict=True) if len(row["text"]) >= 2]
    assert found.prompts == [row["text"][:draw] for row, draw in kept]
    assert found.ids == [ids("<s>" + prompt) for prompt in found.prompts]
    assert found.columns == {name: [row[name] for row, _ in kept] for name in ("text", "row")}
    assert Counter(map(len, found.prompts)).keys() == {2, 3, 4}
    other = prompts(path, plain, text_prompt_length=[2, 4], seed=4)
    assert other.prompts != found.prompts
    without_bos = prompts(path, chatml, text_prompt_length=[2, 4], seed=3)
    assert without_bos.ids == [ids(prompt) for prompt in found.prompts]


def test_how_many_texts_are_too_short_for_a_prompt_is_told(plain, save, capsys):
    path = save({"text": "a"}, {"text": "abc"}, {"text": ""})
    assert len(prompts(path, plain, text_prompt_length=[2, 4]).ids) == 1
    line = f"{path}: 2 of 3 texts have less than the 2 tokens of the shortest prompt and are left"
    assert capsys.readouterr().out == line + " out\n"
    prompts(path, plain, text_prompt_length=[1, 1], max_prompt_length=4)
    prompts(save({"text": "ab"}), plain, text_prompt_length=[2, 4])
    assert capsys.readouterr().out.count("\n") == 1


def test_no_prompt_ends_inside_a_character(save):
    tokenizer = train_tokenizer([], 259)  # a token for each byte
    path = save({"text": "a漢字b"})
    for length, expected in ((1, "a"), (2, "a漢"), (4, "a漢"), (5, "a漢字"), (9, "a漢字b")):
        found = prompts(path, tokenizer, text_prompt_length=[min(length, 8), length], seed=0)
        assert found.prompts == [expected]
        assert found.ids == tokenizer(found.prompts).input_ids


def test_an_empty_prompt_is_bos(plain, tokenizer):
    assert prompt_ids(plain, ["abc", ""]) == [ids("<s>abc"), ids("<s>")]
    # This one writes no BOS, which an empty prompt must have all the same.
    assert prompt_ids(tokenizer, ["film is good", ""]) == [[3, 5, 7], [1]]
