"""Files, folders and hub ids to columns."""

import json
import sys

import pytest

from rlhf.data.columns import load_columns
from rlhf.demo.base import write_jsonl
from tests.rlhf.helpers.rows import assistant, fails, prompts, user

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
