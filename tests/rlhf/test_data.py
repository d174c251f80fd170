"""Every kind of file, every format of a row, and what is said where one is wrong.

The tokenizer has a token for each character and for each special token, so that expected ids are
written as text: "<s>ab" is three tokens.
"""

import json
import random
import re
import sys
from collections import Counter
from itertools import islice

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.data.batches import Batches
from rlhf.data.columns import load_columns
from rlhf.data.loaders import Text, load_prompts, load_rankings, load_texts, prompt_ids
from rlhf.data.padding import pad
from rlhf.demo.base import train_tokenizer, write_jsonl
from rlhf.errors import UserError
from rlhf.models.loading import load_causal_lm
from rlhf.sft import count_learnt, token_loss

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzINST[]/?! \n"
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and\nassistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
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


def characters(chat_template: str | None, eos: str, adds_bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        additional_special_tokens=list(SPECIAL),
        chat_template=chat_template,
    )


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


@pytest.fixture
def save(tmp_path):
    def save(*rows: dict) -> str:
        write_jsonl(tmp_path / "data.jsonl", rows)
        return str(tmp_path / "data.jsonl")

    return save


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


UNUSED = {"model_name_or_path": "unused", "dataset_name": "unused", "output_dir": "unused"}


def texts(path: str, tokenizer, **changes) -> list[Text]:
    return load_texts(SFTConfig(**UNUSED | changes), path, "train", tokenizer)


def rankings(path: str, tokenizer, **changes) -> list[list[list[int]]]:
    rows = load_rankings(RewardConfig(**UNUSED | changes), path, "train", tokenizer)
    return [row.answers for row in rows]


def prompts(path: str, tokenizer, **changes):
    config = PPOConfig(**UNUSED | {"reward_funcs": ["unused"]} | changes)
    return load_prompts(config, path, "train", tokenizer)


def fails(load, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# Files


def test_json_is_read_without_the_datasets_package(tmp_path, save, monkeypatch):
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = [{"prompt": "a\u2028b", "n": 1}, {"prompt": "c", "late": [2]}]
    expected = {"prompt": ["a\u2028b", "c"], "n": [1, None], "late": [None, [2]]}
    (tmp_path / "data.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    assert load_columns(str(tmp_path / "data.json")) == expected
    assert load_columns(save(*rows)) == expected
    (tmp_path / "data.csv").write_text("prompt\na\n")
    assert load_columns(str(tmp_path / "data.csv")) == {"prompt": ["a"]}
    (tmp_path / "data.parquet").write_text("")
    for path in ("data.parquet", ""):
        fails(lambda path=path: load_columns(str(tmp_path / path)), "pip install datasets")


def test_csv_cells_are_strings_whatever_they_look_like(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('text,label\n12,1.50\n"a, ""b""\nc",\n\nNA,true\n', encoding="utf-8-sig")
    assert load_columns(str(path)) == {
        "text": ["12", 'a, "b"\nc', "NA"],
        "label": ["1.50", "", "true"],
    }
    path.write_text(f"text\n{'a' * 200_000}\n")
    assert load_columns(str(path)) == {"text": ["a" * 200_000]}


def test_parquet_and_saved_folders_hold_strings_and_messages(tmp_path, chatml):
    from datasets import Dataset, DatasetDict

    rows = [
        {"prompt": [user("hi")], "label": 1},
        # Arrow gives the other rows' messages the key `name` too.
        {"prompt": [user("yo") | {"name": "x"}, assistant("a"), user("b")], "label": 2},
    ]
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "data.parquet")
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset.select([0]), test=dataset).save_to_disk(tmp_path / "splits")
    write_jsonl(tmp_path / "data.jsonl", rows)
    expected = prompts(str(tmp_path / "data.jsonl"), chatml)
    for name in ("data.parquet", "one"):
        assert prompts(str(tmp_path / name), chatml) == expected
    assert expected.prompts == [row["prompt"] for row in rows]
    assert expected.columns == {"label": [1, 2]}

    splits = str(tmp_path / "splits")
    assert len(load_columns(splits)["label"]) == 1
    assert len(load_columns(splits, split="test")["label"]) == 2
    fails(lambda: load_columns(splits, split="dev"), "no split 'dev'", "['train', 'test']")


def test_a_name_that_is_no_file_is_a_hub_id(monkeypatch, capsys):
    import datasets

    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    columns = load_columns("someone/some-data.v2", split="test", config_name="small")
    assert list(columns["text"]) == ["a"]
    assert asked == [(("someone/some-data.v2", "small"), {"split": "test"})]
    line = "asking the hub for someone/some-data.v2, which is no local path\n"
    assert capsys.readouterr().out == line
    for path in (
        "missing.jsonl",
        "a/missing.csv",
        "missing.parquet",
        "m.json",
        "./data",
        "/a",
        "a/b/c",
    ):
        fails(lambda path=path: load_columns(path), path, "does not exist", ".jsonl")
    assert len(asked) == 1


def test_a_data_set_that_the_hub_does_not_give_is_named(monkeypatch):
    import datasets

    def refuse(*args, **options):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    fails(
        lambda: load_columns("someone/nothing", split="dev"),
        "neither a file or folder someone/nothing",
        "'dev'",
        "Couldn't reach the Hub",
    )


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("d.jsonl", '{"a": 1}\n\n{"a": \n', ("d.jsonl, line 3: not valid JSON",)),
        ("d.json", '[{"a": 1},\n x]', ("d.json, line 2: not valid JSON",)),
        ("d.json", '{\n"a": 1}', ("must hold a list of objects", "{'a': 1}")),
        ("d.jsonl", '{"a": 1}\n[2]\n', ("row 2: must be an object, got [2]",)),
        ("d.jsonl", "[" * 100_000, ("line 1: JSON nested too deeply",)),
        ("d.jsonl", b"\xff\xfe", ("cannot read", "d.jsonl")),
        ("d.jsonl", "", ("d.jsonl is empty", "at least one row")),
        ("d.json", "[]", ("d.json is empty",)),
        ("d.csv", "", ("d.csv is empty",)),
        ("d.csv", "text\n", ("d.csv is empty",)),
        ("d.csv", "a,b\n1,2\n3\n", ("d.csv, line 3", "2 cells of the header, got 1")),
        ("d.csv", 'a\n"b\n', ("d.csv, line", "not valid CSV")),
        ("d.parquet", "nonsense", ("d.parquet is not a parquet file",)),
        ("d.txt", "text", ("d.txt", "give a .jsonl, .json, .csv or .parquet file")),
        ("folder/notes.md", "text", ("folder is not a saved data set",)),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, parts):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(lambda: load_columns(str(path.parent if name.startswith("folder") else path)), *parts)


def test_an_empty_saved_data_set_is_named(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    fails(
        lambda: load_columns(str(tmp_path / "saved")), "saved is not a saved data set", "an empty"
    )
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "data.parquet")
    fails(lambda: load_columns(str(tmp_path / "data.parquet")), "data.parquet is empty")


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


# Errors of rows


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


# Batches


def test_rows_are_padded_on_either_side():
    rows, mask = pad([[5, 6, 7], [8]], 0)
    assert rows.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    rows, mask = pad([[5, 6, 7], [8]], 5, side="left")
    assert rows.tolist() == [[5, 6, 7], [5, 5, 8]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    flags, _ = pad([[False, True], [True]], False)
    assert flags.tolist() == [[False, True], [True, False]]


def take(batches: Batches, count: int | None = None) -> list[list[list[int]]]:
    """The next `count` batches, or all that are left."""
    taken = []
    for batch in islice(batches, count):
        taken.append(batch)
        batches.advance()
    return taken


def test_every_epoch_holds_every_example_once():
    config = SFTConfig(**UNUSED, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    lengths = [1 + i % 7 for i in range(20)]
    assert Batches(lengths, config).total == 4
    config.num_train_epochs = 2
    steps = take(Batches(lengths, config))
    for epoch in (steps[:4], steps[4:]):
        assert Counter(i for batch in epoch for micro in batch for i in micro) == Counter(range(20))
        assert sorted(sum(map(len, batch)) for batch in epoch) == [2, 6, 6, 6]
        assert all(len(micro) <= 3 for batch in epoch for micro in batch)


def test_steps_are_counted_over_epochs_and_processes(monkeypatch):
    def steps(**changes) -> int:
        defaults = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
        return Batches([1] * 20, SFTConfig(**UNUSED | defaults | changes)).total

    assert steps(num_train_epochs=2.5) == 10
    assert steps(num_train_epochs=1.1, per_device_train_batch_size=1) == 11
    assert steps(max_steps=7) == 7
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert steps() == 2
    assert steps(max_steps=7) == 7


def test_batches_do_not_depend_on_how_many_processes_share_them(monkeypatch):
    def first_batches(accumulation: int) -> list[list[list[int]]]:
        config = SFTConfig(
            **UNUSED,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulation,
            max_steps=9,
        )
        return take(Batches(list(range(40)), config))

    alone = first_batches(4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert first_batches(2) == alone
    assert max(len(batch) for batch in alone) == 4
    for batch in alone:
        shares = [batch[rank::2] for rank in range(2)]
        assert sorted(shares[0] + shares[1]) == sorted(batch)
        assert len(shares[0]) <= 2 and len(shares[1]) <= 2
