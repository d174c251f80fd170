"""Reading data sets, wherever they are, into columns."""

import csv
import gzip
import json
import zlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TextIO

from rlhf.data.hub import may_be_hub_id, say_asking
from rlhf.errors import UserError, one_line, quote

KINDS = (
    "a .jsonl, .json, .csv or .parquet file (the former three also .gz), a folder that datasets "
    "saved or that was cloned from the hub, or a hub id"
)
# Deeper values cannot be copied or written.
MAX_DEPTH = 100


def load_columns(
    path: str, *, split: str = "train", config_name: str | None = None
) -> dict[str, Sequence]:
    """The columns of a data set by name, each with one value per row.

    Args:
        path: a .jsonl file (one object a line), a .json file (a list of objects, or one a line), a
            .csv file with a header, each of them also as .gz, a .parquet file, a folder written by
            `save_to_disk` or of data files as on the hub, or a hub id.
        split: of a folder that holds several, or of a hub id.
        config_name: of a folder cloned from the hub, or of a hub id.

    A JSON key that a row lacks is None there. Every CSV cell is a string, an empty one too. Raises
    UserError for a data set that is not there, cannot be read, names a column or key twice, or has
    no rows.
    """
    source = Path(path)
    if source.is_dir():
        columns = _read_folder(path, split, config_name)
    elif _kind(source) in READERS:
        columns = _read_file(source)
    elif source.exists():
        raise UserError(f"cannot tell what {path} holds by its name: give {KINDS}")
    elif may_be_hub_id(path):
        columns = _read_hub(path, split, config_name)
    else:
        raise UserError(f"data set {path} does not exist: give {KINDS}")
    if not columns or len(next(iter(columns.values()))) == 0:
        raise UserError(f"data set {path} is empty: it must have at least one row")
    return columns


def _read_file(source: Path) -> dict[str, Sequence]:
    if not source.is_file():
        raise UserError(f"data file {source} does not exist: give {KINDS}")
    try:
        return READERS[_kind(source)](source)
    # EOFError and zlib's are of gzip.
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {one_line(error)}") from error


def _kind(source: Path) -> str:
    """The end of its name that tells its format; gzip's counts for the text formats."""
    kind = Path(source.name.removesuffix(".gz")).suffix
    return source.suffix if kind == ".parquet" else kind


def _open_text(source: Path, newline: str | None = None) -> TextIO:
    opener = gzip.open if source.suffix == ".gz" else open
    return opener(source, "rt", encoding="utf-8-sig", newline=newline)


def _read_jsonl(source: Path) -> dict[str, list]:
    with _open_text(source) as file:
        return _from_lines(source, file.read())


def _from_lines(source: Path, text: str) -> dict[str, list]:
    # Not splitlines(): U+2028 and its like may stand in a JSON string.
    lines = enumerate(text.split("\n"), 1)
    return _from_rows(source, [_parse(source, n, line) for n, line in lines if line.strip()])


def _read_json(source: Path) -> dict[str, list]:
    """A list of objects, or one object a line."""
    with _open_text(source) as file:
        text = file.read()
    first = text.lstrip()[:1]
    if first == "{" and ("\n" not in text.strip() or _has_more(text)):
        return _from_lines(source, text)
    rows = _parse(source, 1, text)
    if not isinstance(rows, list):
        raise UserError(
            f"{source} must hold a list of objects, or an object in each line, got {quote(rows)}"
        )
    return _from_rows(source, rows)


def _has_more(text: str) -> bool:
    """Tells whether something follows the JSON value that the text begins with."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):  # `_parse` tells where
        return False
    return end < len(text.strip())


def _parse(source: Path, first_line: int, text: str):
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{source}, line {line}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{source}, line {first_line}: JSON nested too deeply") from error
    except ValueError as error:  # a key given twice, an integer of more digits than Python reads
        lines = f"line {first_line}" + (" or below" if "\n" in text.strip() else "")
        raise UserError(f"{source}, {lines}: not valid JSON: {error}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise UserError(
            f"{source}, line {first_line}: JSON nested too deeply, more than {MAX_DEPTH} levels"
        )
    return value


def _object(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(
            f"key {quote(_twice([key for key, _ in pairs]))} stands twice in an object"
        )
    return row


def _twice(names: Sequence[str]) -> str | None:
    """The first name that stands there again."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _is_deep(value: object) -> bool:
    """Tells whether lists and dicts in it are nested beyond MAX_DEPTH."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        children = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for x in chain.from_iterable(children) if isinstance(x, dict | list)]
        depth += 1
    return bool(level)


def _from_rows(source: Path, rows: list) -> dict[str, list]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{source}, row {number}: must be an object, got {quote(row)}")
    names = dict.fromkeys(chain.from_iterable(rows))
    return {name: [row.get(name) for row in rows] for name in names}


def _read_csv(source: Path) -> dict[str, list]:
    csv.field_size_limit(2**31 - 1)  # at first 128 KiB, which is less than a long text
    with _open_text(source, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header, *rows = [(reader.line_num, row) for row in reader if row] or [(0, [])]
        except csv.Error as error:
            raise UserError(f"{source}, line {reader.line_num}: not valid CSV: {error}") from error
    names = header[1]
    _check_names(source, names)
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(
                f"{source}, line {line}: must have the {len(names)} cells of the header, got "
                f"{len(row)}: put cells that hold commas or line breaks in double quotes"
            )
    return {name: [row[i] for _, row in rows] for i, name in enumerate(names)}


def _check_names(source: Path, names: Sequence[str]) -> None:
    if (name := _twice(names)) is not None:
        raise UserError(f"{source} has two columns {quote(name)}: rename or remove one of them")


def _read_parquet(source: Path) -> dict[str, list]:
    try:
        # Here, because the other files need no such package.
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"to read {source} pip install datasets: {error}") from error
    try:
        table = parquet.ParquetFile(source).read()
    except ArrowException as error:
        pointer = source.read_bytes()[:40].startswith(b"version https://git-lfs")
        remedy = ": it is a pointer of Git LFS: git lfs pull brings the file" if pointer else ""
        raise UserError(f"{source} is not a parquet file: {one_line(error)}{remedy}") from error
    _check_names(source, table.column_names)
    return {name: _to_list(source, name, table[name]) for name in table.column_names}


def _to_list(source: Path | str, name: str, column) -> list:
    """The values of a column of Arrow's."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError) as error:  # a time that Python has no date for
        raise UserError(
            f"{source}: column {quote(name)} of {column.type} has a value that Python does not: "
            f"{one_line(error)}: remove the column, or store it as text"
        ) from error


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_folder(path: str, split: str, config_name: str | None) -> dict[str, Sequence]:
    """A folder that `save_to_disk` wrote, or one of files, such as a clone from the hub."""
    datasets = _import_datasets(path)
    is_saved = any(Path(path, name).exists() for name in ("state.json", "dataset_dict.json"))
    try:
        if is_saved:
            dataset = datasets.load_from_disk(path)
        else:
            dataset = datasets.load_dataset(path, config_name)
    except Exception as error:  # a damaged folder raises whatever its reader raises
        raise UserError(
            f"{path} is not a saved data set nor a folder of data files, or an empty one: "
            f"{one_line(error)}"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{path} has no split {split!r}: choose one of {list(dataset)}")
        dataset = dataset[split]
    return _from_dataset(path, dataset)


def _read_hub(path: str, split: str, config_name: str | None) -> dict[str, Sequence]:
    datasets = _import_datasets(path)
    say_asking(path)
    try:
        dataset = datasets.load_dataset(path, config_name, split=split)
    except Exception as error:  # network, hub, builder and split each have their own kind
        raise UserError(
            f"there is neither a file or folder {path} here nor, on the hub, a data set with the "
            f"split {split!r} (check the names and the connection): {one_line(error)}"
        ) from error
    return _from_dataset(path, dataset)


def _import_datasets(path: str):
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path} is not a file, to load it pip install datasets: {error}"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _from_dataset(path: str, dataset) -> dict[str, Sequence]:
    """Its columns, which are read from the disk when they are used: times are tried before."""
    for name in dataset.column_names:
        column = dataset.data.column(name)
        if _holds_times(column.type):
            _to_list(path, name, column)
    return {name: dataset[name] for name in dataset.column_names}


def _holds_times(kind) -> bool:
    """Tells whether a type of Arrow's is one of times, or made of such."""
    from pyarrow.types import is_temporal

    return is_temporal(kind) or any(
        _holds_times(kind.field(i).type) for i in range(kind.num_fields)
    )
