"""Reading tables of examples: JSON lines, JSON, Parquet, CSV and TSV."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert_hf.data.cleaning import replace_surrogates

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
LARGEST_BLOCK = 2**31 - 1  # bytes that Arrow parses at once


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a table of examples.

    A byte-order mark is not part of the first name. White space around the names of columns, and around labels that
    are texts, is removed. A surrogate without its other half, which JSON can hold and a tokenizer refuses, becomes
    U+FFFD.

    Args:
        path: .jsonl (an object a line), .json (the same, or one list of objects), .parquet, .csv or .tsv (with a
            header line). Fields of .csv may be quoted, quotation marks in .tsv are part of the text.

    Returns:
        One dict a row; values of csv and tsv are strings.

    Raises:
        ValueError: for a missing file, unknown type, malformed line, a row of csv or tsv with more or fewer fields
            than the header, two columns of one name, or a file without rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {str(path)!r} does not exist")
    try:
        if path.suffix in (".jsonl", ".json"):
            rows = _json_rows(path)
        elif path.suffix == ".parquet":
            rows = _parquet_rows(path)
        elif path.suffix in (".csv", ".tsv"):
            rows = _separated_rows(path)
        else:
            raise ValueError(f"data file {str(path)!r} has an unknown type; wanted one of {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {str(path)!r} is not UTF-8 text: {error}") from error
    if not rows:
        raise ValueError(f"data file {str(path)!r} is empty; at least one example is wanted")
    return [_tidy(row, path) for row in rows]


def _tidy(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """A row whose names and label are stripped and whose strings are valid Unicode."""
    names = [replace_surrogates(name).strip() for name in row]
    _check_names(names, path)
    values = [replace_surrogates(value) if isinstance(value, str) else value for value in row.values()]
    tidy = dict(zip(names, values, strict=True))
    if isinstance(tidy.get("label"), str):
        tidy["label"] = tidy["label"].strip()
    return tidy


def _check_names(names: list[str], path: Path) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"data file {str(path)!r} has two columns {twice!r}; every name is wanted once")


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        if path.suffix == ".json" and file.read(1) == "[":
            return _json_list(path)
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: wanted a JSON object; got {line.strip()[:60]!r}")
            rows.append(row)
    return rows


def _json_list(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a list of JSON objects ({error})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, entry {number}: wanted a JSON object; got {repr(row)[:60]}")
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data file {str(path)!r} is no whole Parquet file: {error}") from error
    return _table_rows(table, path)


def _separated_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of .csv and .tsv; every value is a string, an empty field is an empty string."""
    import pyarrow
    from pyarrow import csv

    other_length = []

    def refuse(row: csv.InvalidRow) -> str:
        other_length.append(row)
        return "error"

    # In GLUE's own .tsv files a quotation mark is a character like any other.
    tabs = path.suffix == ".tsv"
    # One thread: with several, Arrow does not number the rows. A row cannot be longer than a block.
    reading = csv.ReadOptions(use_threads=False, block_size=min(max(path.stat().st_size + 1, 1 << 20), LARGEST_BLOCK))
    parsing = csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char=False if tabs else '"',
        newlines_in_values=not tabs,
        invalid_row_handler=refuse,
    )
    try:
        with csv.open_csv(path, reading, parsing) as header:
            names = header.schema.names
        texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
        table = csv.read_csv(path, reading, parsing, texts)
    except pyarrow.ArrowException as error:
        if other_length:
            row = other_length[0]
            raise ValueError(
                f"{path}, row {row.number - 1}: {row.actual_columns} fields where the header has "
                f"{row.expected_columns}: {row.text[:60]!r}; a text that holds the separator, a quotation mark or a "
                f"line break must {'not be in a .tsv' if tabs else 'stand in quotation marks'}"
            ) from error
        if "Empty CSV" in str(error):
            return []
        what = "not UTF-8 text" if "UTF8" in str(error) else "not a table"
        raise ValueError(f"data file {str(path)!r} is {what}: {error}") from error
    return _table_rows(table, path)


def _table_rows(table: "pyarrow.Table", path: Path) -> list[dict[str, Any]]:
    _check_names([name.strip() for name in table.column_names], path)  # a dict would keep the last of two
    return table.to_pylist()
