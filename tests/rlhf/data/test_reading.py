"""Data sets of every kind that people bring: read, or refused in a line that names the remedy."""

import datetime
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from rlhf.data import hub
from rlhf.data.columns import load_columns
from rlhf.errors import UserError
from rlhf.models.loading import load_tokenizer

ROWS = [{"prompt": "é\u2028", "n": 1}, {"prompt": "b", "n": 2}]
COLUMNS = {"prompt": ["é\u2028", "b"], "n": [1, 2]}
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def fails(path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        load_columns(str(path))
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
    for part in (path.name, *parts):
        assert part in str(error.value)


# Formats


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("d.json", LINES, COLUMNS),
        ("d.json", "\n  " + LINES.replace("\n", "\r\n"), COLUMNS),
        ("d.json", LINES.split("\n")[1], {"prompt": ["b"], "n": [2]}),
        ("d.json", json.dumps(ROWS, indent=1), COLUMNS),
        ("d.jsonl.gz", LINES, COLUMNS),
        ("d.json.gz", LINES, COLUMNS),
        ("d.json.gz", json.dumps(ROWS), COLUMNS),
        ("d.csv.gz", 'prompt,n\n"a\nb",1\n', {"prompt": ["a\nb"], "n": ["1"]}),
    ],
)
def test_lines_in_json_and_gzip_are_read(tmp_path, name, text, expected):
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert load_columns(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    "content",
    [b"", b"text", gzip.compress(LINES.encode())[:-9], b"\x1f\x8b\x08\0" + b"x" * 99],
    ids=["empty", "text", "cut", "noise"],
)
def test_damaged_gzip_is_named(tmp_path, content):
    (tmp_path / "d.jsonl.gz").write_bytes(content)
    fails(tmp_path / "d.jsonl.gz", "d.jsonl.gz")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder as `git clone` brings it from the hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "clone"

    def make(files: dict[str, str]):
        for name, text in {"README.md": "# Films\n", ".gitattributes": "", **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    return make


def test_a_clone_of_a_data_set_is_read_by_split(clone, capfd):
    folder = clone({"train.jsonl": '{"text": "a"}\n{"text": "b"}\n', "test.jsonl": '{"text": "c"}'})
    assert list(load_columns(str(folder))["text"]) == ["a", "b"]
    assert list(load_columns(str(folder), split="test")["text"]) == ["c"]
    with pytest.raises(UserError, match=r"no split 'dev': choose one of \['train', 'test'\]"):
        load_columns(str(folder), split="dev")
    out, error = capfd.readouterr()
    assert out == error == ""


def test_a_clone_with_parquet_in_data_is_read_in_order(clone):
    folder = clone({})
    (folder / "data").mkdir()
    for number in range(2):
        table = pyarrow.table({"text": [f"row {number}"]})
        parquet.write_table(table, folder / "data" / f"train-0000{number}-of-00002.parquet")
    assert list(load_columns(str(folder))["text"]) == ["row 0", "row 1"]


def test_a_clone_with_configurations_is_read(clone):
    readme = (
        "---\nconfigs:\n- config_name: main\n  data_files: main/train.csv\n"
        "- config_name: hard\n  data_files: hard/train.csv\n---\n"
    )
    files = {"README.md": readme, "main/train.csv": "text\na\n", "hard/train.csv": "text\nb\n"}
    folder = clone(files)
    assert list(load_columns(str(folder), config_name="hard")["text"]) == ["b"]
    fails(folder, "main", "hard")


def test_a_folder_without_data_is_named(clone):
    fails(clone({}), "nor a folder of data files")


def test_a_pointer_of_git_lfs_is_told_by_name(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (tmp_path / "d.parquet").write_text(pointer)
    fails(tmp_path / "d.parquet", "git lfs pull")


# What nobody can read


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}", ("line 2", "4300 digits")),
        ("d.json", '[{"a": ' + "9" * 5000 + "}]", ("line 1", "4300 digits")),
        ("d.jsonl", '{"a": 1, "b": 2, "a": 3}', ("line 1", "key 'a' stands twice")),
        ("d.jsonl", '{"a": {"b": 1, "b": 2}}', ("line 1", "key 'b' stands twice")),
        ("d.json", '[{"a": 1},\n{"a": 1, "a": 2}]', ("key 'a' stands twice",)),
        ("d.csv", "a,b,a\n1,2,3\n", ("two columns 'a'", "rename")),
        ("d.jsonl", '{"a": ' + "[" * 900 + "]" * 900 + "}", ("line 1", "nested too deeply")),
        ("d.jsonl", '{"a": ' * 900 + "1" + "}" * 900, ("line 1", "nested too deeply")),
        ("d.jsonl", '{"a": "' + "x" * 99_999, ("line 1", "not valid JSON")),
        ("d.json", '{"a": 1}\n{"a": \n', ("line 2", "not valid JSON")),
        ("d.json", '"' + "x" * 99_999 + '"', ("must hold a list of objects", "xxx...")),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, name, content, parts):
    (tmp_path / name).write_text(content)
    fails(tmp_path / name, *parts)


def test_brackets_in_a_text_are_not_depth(tmp_path):
    text = "[{" * 900
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": text, "n": [[1]]}))
    assert load_columns(str(tmp_path / "d.jsonl")) == {"text": [text], "n": [[[1]]]}


def test_parquet_with_two_columns_of_a_name(tmp_path):
    table = pyarrow.table([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    parquet.write_table(table, tmp_path / "d.parquet")
    fails(tmp_path / "d.parquet", "two columns 'a'")


def far_future() -> pyarrow.Array:
    return pyarrow.array([0, 2**62], pyarrow.timestamp("us"))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_time_that_python_has_no_date_for(tmp_path, kind):
    from datasets import Dataset

    table = pyarrow.table({"text": ["a", "b"], "when": far_future()})
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        Dataset(table).save_to_disk(path)
    fails(path, "column 'when' of timestamp[us]", "store it as text")


def test_a_time_that_python_has_a_date_for(tmp_path):
    when = datetime.datetime(2026, 11, 28)
    parquet.write_table(pyarrow.table({"when": [when]}), tmp_path / "d.parquet")
    assert load_columns(str(tmp_path / "d.parquet")) == {"when": [when]}


def test_a_column_of_900_levels(tmp_path):
    def nested(levels: int) -> pyarrow.Table:
        column = pyarrow.array([1])
        for _ in range(levels):
            column = pyarrow.ListArray.from_arrays([0, 1], column)
        return pyarrow.table({"deep": column})

    parquet.write_table(nested(20), tmp_path / "d.parquet")
    assert str(load_columns(str(tmp_path / "d.parquet"))["deep"][0]).count("[") == 20
    parquet.write_table(nested(900), tmp_path / "d.parquet")
    fails(tmp_path / "d.parquet", "nested")


# The hub


def test_whenever_the_hub_is_asked_a_line_says_so_first(monkeypatch, capsys):
    def refuse(name: str, **_):
        raise ConnectionError("no network")

    hub.say_asking.cache_clear()
    monkeypatch.setattr("rlhf.models.loading.AutoTokenizer.from_pretrained", refuse)
    for _ in range(2):
        with pytest.raises(UserError, match="someone/model"):
            load_tokenizer("someone/model")
    line = "asking the hub for someone/model, which is no local path\n"
    assert capsys.readouterr().out == line
