"""Reading tables of examples: JSON lines, JSON, Parquet, CSV and TSV."""

import csv
import json
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a table of examples.

    Args:
        path: .jsonl (an object a line), .json (the same, or one list of objects), .parquet, .csv or .tsv (with a
            header line). Fields of .csv may be quoted, quotation marks in .tsv are part of the text.

    Returns:
        One dict a row; values of csv and tsv are strings.

    Raises:
        ValueError: for a missing file, unknown type, malformed line or a file without rows.
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
            # In GLUE's own .tsv files a quotation mark is a character like any other.
            form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, **form))
        else:
            raise ValueError(f"data file {str(path)!r} has an unknown type; wanted one of {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {str(path)!r} is not UTF-8 text: {error}") from error
    except csv.Error as error:
        raise ValueError(f"data file {str(path)!r} is not a table of short fields: {error}") from error
    if not rows:
        raise ValueError(f"data file {str(path)!r} is empty; at least one example is wanted")
    return rows


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8") as file:
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
        rows = json.loads(path.read_text(encoding="utf-8"))
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
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data file {str(path)!r} is no whole Parquet file: {error}") from error
