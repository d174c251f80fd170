"""Chat templates of newer models: thoughts that later turns leave out, tools, options, parts."""

import json

import pytest
import torch
from transformers import LlamaConfig

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.data.chat import Text
from rlhf.data.loaders import Prompts, load_prompts, load_rankings, load_texts
from rlhf.data.padding import pad
from rlhf.demo.base import write_jsonl
from rlhf.errors import UserError
from rlhf.rewards.kinds import ModelReward
from rlhf.rewards.scoring import Samples
from rlhf.rollout import Responses
from tests.rlhf.helpers.tokenizer_kinds import byte_level, sentencepiece

UNUSED = {"model_name_or_path": "unused", "dataset_name": "unused", "output_dir": "unused"}
# As Qwen3: a turn before the last question loses its thoughts, the last one has them even if empty.
QWEN = """
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
{%- set parts = (m.content or '').split('</think>') %}
{%- set thought = parts[0].replace('<think>', '').strip() * (parts | length - 1) %}
{%- if loop.index0 > ns.last and (loop.last or parts | length > 1) %}
{{- '<think>\n' + thought + '\n</think>\n\n' }}
{%- endif %}
{{- parts[-1].strip() }}
{%- for call in m.tool_calls or [] %}{{ '\n<call>' + call.function.name + '</call>' }}{% endfor %}
{%- else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}
"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "plot", "parameters": {"a": {"type": "int"}}}}]
CALL = {"type": "function", "function": {"name": "plot", "arguments": {"a": 1}}}


def with_template(template: str):
    tokenizer = byte_level()
    special = {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def qwen():
    return with_template(QWEN)


@pytest.fixture(scope="module")
def chatml():
    return with_template(CHATML)


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content, **others) -> dict:
    return {"role": "assistant", "content": content, **others}


def texts(path: str, tokenizer, **changes) -> list[Text]:
    return load_texts(SFTConfig(**UNUSED | changes), path, "train", tokenizer)


def rankings(path: str, tokenizer) -> list[list[list[int]]]:
    rows = load_rankings(RewardConfig(**UNUSED), path, "train", tokenizer)
    return [row.answers for row in rows]


def prompts(path: str, tokenizer) -> Prompts:
    config = PPOConfig(**UNUSED, reward_funcs=["unused"])
    return load_prompts(config, path, "train", tokenizer)


def spans(text: Text, tokenizer) -> list[tuple[list[int], str]]:
    """What is learnt in one go, each with all ids before it."""
    found, start = [], None
    for position, flag in enumerate([*text.learnt, False]):
        if flag and start is None:
            start = position
        if not flag and start is not None:
            found.append((text.ids[:start], tokenizer.decode(text.ids[start:position])))
            start = None
    return found


def refused(load, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# Multi-turn SFT


def test_each_answer_is_learnt_after_the_prompt_it_is_generated_from(qwen, save, capsys):
    chat = [
        *(user("the film"), assistant("<think>\nfilm\n</think>\n\nwas good")),
        *(user("the plot"), assistant("<think>\nplot\n</think>\n\nwas weak")),
    ]
    path = save({"messages": chat}, {"messages": chat[:2]})
    found = [span for text in texts(path, qwen) for span in spans(text, qwen)]
    answers = [
        "<think>\nfilm\n</think>\n\nwas good<|im_end|>",
        "<think>\nplot\n</think>\n\nwas weak<|im_end|>",
    ]
    assert [answer for _, answer in found] == [*answers, answers[0]]
    asked = prompts(save(*({"prompt": chat[:n]} for n in (1, 3, 1))), qwen)
    assert [before for before, _ in found] == asked.ids
    assert "film\n</think>" not in qwen.decode(asked.ids[1])  # the template left it out
    assert capsys.readouterr().out == (
        f"{path}: 1 of 2 conversations become 2 rows, one for each answer, before which the chat "
        "template writes earlier turns otherwise\n"
    )


def test_turns_that_the_template_keeps_share_a_row(qwen, chatml, save, capsys):
    """As between two calls of a tool, of which Qwen3 keeps the thoughts."""
    loop = [
        user("the film"),
        assistant("<think>\na\n</think>\n\n", tool_calls=[CALL]),
        {"role": "tool", "content": "0 1"},
        assistant("<think>\nb\n</think>\n\nwas good"),
    ]
    (text,) = texts(save({"messages": loop}), qwen)
    found = spans(text, qwen)
    assert [answer for _, answer in found] == [
        "<think>\na\n</think>\n\n\n<call>plot</call><|im_end|>",
        "<think>\nb\n</think>\n\nwas good<|im_end|>",
    ]
    asked = prompts(save({"prompt": loop[:1]}, {"prompt": loop[:3]}), qwen)
    assert [before for before, _ in found] == asked.ids

    plain = [user("the film"), assistant("was good"), user("the plot"), assistant("was weak")]
    (text,) = texts(save({"messages": plain}), chatml)
    assert [answer for _, answer in spans(text, chatml)] == [
        "was good<|im_end|>",
        "was weak<|im_end|>",
    ]
    assert capsys.readouterr().out == ""


def test_a_tokens_growth_over_the_seam_changes_no_prompt(save):
    """`[/INST]` and an answer that begins with the same letters as a longer token."""
    tokenizer = with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    path = save({"messages": [user("the fil"), assistant("m was")]})
    (text,) = texts(path, tokenizer)
    ((before, answer),) = spans(text, tokenizer)
    assert (before, answer) == (tokenizer("the fil").input_ids, "m was<|im_end|>")


def test_of_a_completion_the_assistants_messages_are_learnt(chatml, save):
    row = {
        "prompt": [user("the film")],
        "completion": [assistant("a"), user("the plot"), assistant("b")],
    }
    (text,) = texts(save(row), chatml)
    assert [answer for _, answer in spans(text, chatml)] == ["a<|im_end|>", "b<|im_end|>"]
    row["prompt"] += [assistant("was good"), user("the end")]
    (text,) = texts(save(row), chatml)
    assert [answer for _, answer in spans(text, chatml)] == ["a<|im_end|>", "b<|im_end|>"]


def test_an_answer_that_is_not_written_where_it_is_prompted_for_is_refused(save):
    """As reasoning models do that open <think> in the prompt and drop it from answers."""
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    tokenizer = with_template(template)
    path = save({"messages": [user("a"), assistant("b")]})
    refused(lambda: texts(path, tokenizer), "row 1", "<think>", "{% generation %}")


# What rows give to the template


@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS)])
def test_tools_go_into_every_template(qwen, save, written):
    chat, answer, row = [user("the film")], [assistant("was good")], {"tools": written}
    taught = [
        *(text.ids for text in texts(save({"messages": chat + answer} | row), qwen)),
        *(text.ids for text in texts(save({"prompt": chat, "completion": answer} | row), qwen)),
        *prompts(save({"prompt": chat} | row), qwen).ids,
        *prompts(save({"messages": chat + answer} | row), qwen).ids,
        *rankings(save({"prompt": chat, "chosen": answer, "rejected": answer} | row), qwen)[0],
        *rankings(save({"chosen": chat + answer, "rejected": chat + answer} | row), qwen)[0],
    ]
    expected = '<|im_start|>system\n{"type": "function", "function": {"name": "plot"'
    assert [qwen.decode(ids).startswith(expected) for ids in taught] == [True] * 8
    assert prompts(save({"prompt": chat} | row), qwen).columns == {"tools": [written]}


def test_options_go_into_every_template(qwen, save):
    chat, answer = [user("the film")], [assistant("was good")]
    row = {"chat_template_kwargs": {"enable_thinking": False}}
    no_thoughts = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    (ids, other) = prompts(save({"prompt": chat} | row, {"prompt": chat}), qwen).ids
    assert qwen.decode(ids).endswith(no_thoughts)
    assert qwen.decode(other).endswith("<|im_start|>assistant\n")
    for data in ({"messages": chat + answer}, {"prompt": chat, "completion": answer}):
        (text,) = texts(save(data | row), qwen)
        assert spans(text, qwen) == [(ids, "was good<|im_end|>")]
        (text,) = texts(save(data), qwen)
        assert spans(text, qwen) == [(other, "<think>\n\n</think>\n\nwas good<|im_end|>")]
    data = {"prompt": chat, "chosen": answer, "rejected": answer}
    assert rankings(save(data | row), qwen)[0][0] == text.ids


def test_what_arrow_adds_to_tools_and_messages_is_taken_away(qwen, tmp_path):
    from datasets import Dataset

    other = [{"type": "function", "function": {"name": "end", "strict": True}}]
    rows = [
        {"prompt": [user("a"), assistant("b", tool_calls=[CALL]), user("c")], "tools": TOOLS},
        {"prompt": [user("a")], "tools": other},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    write_jsonl(tmp_path / "data.jsonl", rows)
    first, second = (prompts(str(tmp_path / f"data.{x}"), qwen) for x in ("parquet", "jsonl"))
    decoded = [[qwen.decode(ids) for ids in found.ids] for found in (first, second)]
    assert "null" not in decoded[0][0] + decoded[0][1]
    assert first.prompts == second.prompts
    assert [json.loads(text.splitlines()[1].removesuffix("<|im_end|>")) for text in decoded[0]] == [
        *TOOLS,
        *other,
    ]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "a", "tools": TOOLS}, ("the column tools", "strings: give messages")),
        (
            {"prompt": "a", "chat_template_kwargs": {"b": 1}},
            ("the column chat_template_kwargs", "strings"),
        ),
        ({"text": "the film was", "tools": TOOLS}, ("the column tools", "strings")),
        ({"prompt": [user("a")], "tools": TOOLS}, ("row 1", "does not know 'tools'")),
        (
            {"prompt": [user("a")], "chat_template_kwargs": {"enable_thinking": False}},
            ("row 1", "does not know 'enable_thinking'"),
        ),
        (
            {"prompt": [user("a")], "chat_template_kwargs": {"tokenize": True}},
            ("row 1", "cannot set 'tokenize'"),
        ),
        ({"prompt": [user("a")], "tools": ["plot"]}, ("row 1", "list of JSON schemas", "['plot']")),
        ({"prompt": [user("a")], "tools": "plot"}, ("row 1", "list of JSON schemas", "'plot'")),
        (
            {"prompt": [user("a")], "chat_template_kwargs": [1]},
            ("row 1", "must be a dict, got [1]"),
        ),
    ],
)
def test_what_cannot_go_into_the_template_is_refused(chatml, save, row, parts):
    refused(lambda: prompts(save(row), chatml), *parts)


def test_empty_options_are_none(chatml, save):
    for row in ({"tools": None}, {"tools": []}, {"tools": ""}, {"chat_template_kwargs": {}}):
        assert prompts(save({"prompt": [user("a")]} | row, {"prompt": [user("a")]}), chatml).ids
        assert prompts(save({"prompt": "a"} | row), chatml).ids


# Messages


def test_text_parts_are_the_text_that_they_make_up(chatml, save):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "film"}]
    found = prompts(save({"prompt": [user(parts)]}), chatml)
    assert found == prompts(save({"prompt": [user("the film")]}), chatml)
    assert found.prompts == [[user("the film")]]
    for bad in ([{"type": "image"}], ["the film"], [{"type": "text"}]):
        refused(
            lambda bad=bad: prompts(save({"prompt": [user(bad)]}), chatml), "row 1", "only text"
        )


def test_a_call_of_a_tool_needs_no_content(qwen, save):
    call = {"role": "assistant", "tool_calls": [CALL]}
    for message in (call, call | {"content": None}):
        (text,) = texts(save({"messages": [user("a"), message]}), qwen)
        ((_, answer),) = spans(text, qwen)
        assert answer.endswith("<call>plot</call><|im_end|>")
    bad = {"role": "assistant", "tool_calls": []}
    refused(lambda: texts(save({"messages": [user("a"), bad]}), qwen), "row 1", "role and content")


# Responses and reward models


def answered(prompts: list[list[int]], tokens: list[list[int]]) -> Responses:
    (prompt_ids, prompt_mask), (ids, mask) = pad(prompts, 2, "left"), pad(tokens, 2)
    return Responses(prompt_ids, prompt_mask, ids, mask, torch.tensor([True] * len(tokens)))


def test_the_space_that_a_template_writes_is_not_the_answers():
    tokenizer = sentencepiece()
    tokenizer.chat_template = LLAMA2
    chat = [user("the film")]
    start = tokenizer("<s>[INST] the film [/INST]", add_special_tokens=False).input_ids
    whole = tokenizer("<s>[INST] the film [/INST] was ok", add_special_tokens=False).input_ids
    responses = answered([start], [whole[len(start) :]])
    assert Samples.of(tokenizer, Prompts([start], [chat], {}), responses).completions == ["was ok"]
    plain = Prompts([start], ["[INST] the film [/INST]"], {})
    assert Samples.of(tokenizer, plain, responses).completions == [" was ok"]


class Scorer(torch.nn.Module):
    """All that a reward model must have to be asked for its tokens."""

    config = LlamaConfig(max_position_embeddings=999, vocab_size=999)
    score = torch.nn.Identity()

    def get_input_embeddings(self):
        return torch.nn.Embedding(999, 1)


@pytest.mark.parametrize("knows", [True, False])
def test_a_reward_model_reads_tools_and_options_if_its_template_knows_them(
    qwen, save, capsys, monkeypatch, knows
):
    own = with_template(QWEN.replace("|>system", "|>tools") if knows else CHATML)
    row = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    given = prompts(save({"prompt": [user("the film")]} | row), qwen)
    end = qwen("was good<|im_end|>").input_ids
    samples = Samples.of(qwen, given, answered(given.ids, [end]))
    read = []
    take = lambda score, responses, config: read.append(responses.unpadded)  # noqa: E731
    monkeypatch.setattr("rlhf.rewards.kinds._score_in_parts", take)
    config = PPOConfig(**UNUSED, reward_funcs=["unused"])
    reward = ModelReward("judge", 1.0, Scorer(), own, qwen, None, config)
    reward.check(given, 99)
    reward(samples)
    ((starts, ends),) = read
    ids = starts[0] + ends[0]
    answer = [assistant("was good")]
    data = {"prompt": given.prompts[0], "chosen": answer, "rejected": answer}
    assert ids == rankings(save(data | row if knows else data), own)[0][0]
    line = "reward judge: its chat template does not know enable_thinking, tools of the data, and "
    assert capsys.readouterr().out == ("" if knows else line + "does without\n")
