"""Reading data sets, wherever they are, into columns."""

import csv
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rlhf import distributed
from rlhf.errors import UserError, one_line
from rlhf.hub import may_be_hub_id

KINDS = "a .jsonl, .json, .csv or .parquet file, a folder saved by datasets, or a hub id"


def load_columns(
    path: str, *, split: str = "train", config_name: str | None = None
) -> dict[str, Sequence]:
    """The columns of a data set by name, each with one value per row.

    Args:
        path: a .jsonl file (one object a line), a .json file (a list of objects), a .csv file with
            a header, a .parquet file, a folder written by `save_to_disk`, or a hub id.
        split: of a folder that holds several, or of a hub id.
        config_name: of a hub id.

    A JSON key that a row lacks is None there. Every CSV cell is a string, an empty one too. Raises
    UserError for a data set that is not there, cannot be read, or has no rows.
    """
    source = Path(path)
    if source.is_dir():
        columns = _read_folder(path, split)
    elif source.suffix in READERS:
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
        return READERS[source.suffix](source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {one_line(error)}") from error


def _read_jsonl(source: Path) -> dict[str, list]:
    # Not splitlines(): U+2028 and its like may stand in a JSON string.
    lines = enumerate(source.read_text(encoding="utf-8-sig").split("\n"), 1)
    return _from_rows(
        source, [_parse(source, number, line) for number, line in lines if line.strip()]
    )


def _read_json(source: Path) -> dict[str, list]:
    rows = _parse(source, 1, source.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise UserError(f"{source} must hold a list of objects, got {rows!r:.60}")
    return _from_rows(source, rows)


def _parse(source: Path, first_line: int, text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{source}, line {line}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{source}, line {first_line}: JSON nested too deeply") from error


def _from_rows(source: Path, rows: list) -> dict[str, list]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{source}, row {number}: must be an object, got {row!r:.60}")
    names = dict.fromkeys(chain.from_iterable(rows))
    return {name: [row.get(name) for row in rows] for name in names}


def _read_csv(source: Path) -> dict[str, list]:
    csv.field_size_limit(2**31 - 1)  # at first 128 KiB, which is less than a long text
    with source.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header, *rows = [(reader.line_num, row) for row in reader if row] or [(0, [])]
        except csv.Error as error:
            raise UserError(f"{source}, line {reader.line_num}: not valid CSV: {error}") from error
    names = header[1]
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(
                f"{source}, line {line}: must have the {len(names)} cells of the header, got "
                f"{len(row)}: put cells that hold commas or line breaks in double quotes"
            )
    return {name: [row[i] for _, row in rows] for i, name in enumerate(names)}


def _read_parquet(source: Path) -> dict[str, list]:
    try:
        # Here, because the other files need no such package.
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"to read {source} pip install datasets: {error}") from error
    try:
        table = parquet.ParquetFile(source).read()
    except ArrowException as error:
        raise UserError(f"{source} is not a parquet file: {one_line(error)}") from error
    return {name: table[name].to_pylist() for name in table.column_names}


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_folder(path: str, split: str) -> dict[str, Sequence]:
    datasets = _import_datasets(path)
    try:
        dataset = datasets.load_from_disk(path)
    except Exception as error:  # a damaged folder raises whatever its reader raises
        raise UserError(
            f"{path} is not a saved data set, or an empty one: {one_line(error)}"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{path} has no split {split!r}: choose one of {list(dataset)}")
        dataset = dataset[split]
    return _from_dataset(dataset)


def _read_hub(path: str, split: str, config_name: str | None) -> dict[str, Sequence]:
    datasets = _import_datasets(path)
    if distributed.is_main():
        print(f"asking the hub for {path}, which is no local path", flush=True)
    try:
        dataset = datasets.load_dataset(path, config_name, split=split)
    except Exception as error:  # network, hub, builder and split each have their own kind
        raise UserError(
            f"there is neither a file or folder {path} here nor, on the hub, a data set with the "
            f"split {split!r} (check the names and the connection): {one_line(error)}"
        ) from error
    return _from_dataset(dataset)


def _import_datasets(path: str):
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path} is not a file, to load it pip install datasets: {error}"
        ) from error
    return datasets


def _from_dataset(dataset) -> dict[str, Sequence]:
    return {name: dataset[name] for name in dataset.column_names}
