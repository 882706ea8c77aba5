"""Reading files of this machine: documents of a corpus, tables of examples, Parquet files of token ids.

Documents are read a line or a batch at a time. `datasets` reads what comes from the Hub (`data/sources.py`). It does
not read these files: it refuses half an emoji in JSON, names no row, and needs one more package for .zst.
"""

import contextlib
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastbert_hf.data.cleaning import replace_surrogates

if TYPE_CHECKING:
    import pyarrow.parquet

ROWS = 1000  # of a Parquet file at once
LARGEST_BLOCK = 2**31 - 1  # bytes that Arrow parses at once


def _open_zst(path: Path, mode: str, encoding: str) -> IO[str]:
    import pyarrow as pa

    return io.TextIOWrapper(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), encoding=encoding)


COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zst}
LINES = (".txt", ".jsonl")  # one document a line; each may be compressed
CORPUS_SUFFIXES = (*LINES, *(kind + packed for kind in LINES for packed in COMPRESSED), *COMPRESSED, ".parquet")
TABLE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


def check_corpus_files(paths: Iterable[str | Path]) -> list[Path]:
    """Check that every corpus file exists and has a known type.

    Args:
        paths: files to read later.

    Returns:
        The same files as paths.

    Raises:
        ValueError: if no file is given, one is missing or is a folder, or its suffix is unknown.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise ValueError(f"no corpus file was given; expected at least one of {', '.join(CORPUS_SUFFIXES)}")
    for file in files:
        if not file.is_file():
            raise ValueError(f"file {str(file)!r} does not exist or is not a file")
        if not file.name.endswith(CORPUS_SUFFIXES):
            raise ValueError(f"file {str(file)!r} has an unknown type; wanted one of {', '.join(CORPUS_SUFFIXES)}")
    return files


def read_documents(paths: Iterable[str | Path], text_column: str = "text") -> Iterator[str]:
    """Read documents in the order of files and rows; only a small part is in memory at a time.

    Args:
        paths: UTF-8 text, one document a line (.txt), JSON objects, one a line (.jsonl), both also compressed (.gz,
            .xz, .zst; without .txt or .jsonl before it: text), or tables (.parquet). Blank documents are skipped;
            lone surrogates become U+FFFD.
        text_column: field of .jsonl and .parquet that holds the text.

    Yields:
        One document at a time, without its line ending.

    Raises:
        ValueError: for a missing file, an unknown type, content that is cut off or not what the suffix says, or a row
            without text, naming file and row.
    """
    for file in check_corpus_files(paths):
        if file.suffix == ".parquet":
            documents = _parquet_documents(file, text_column)
        elif ".jsonl" in file.suffixes[-2:]:
            documents = (text_of(row, text_column, where) for where, row in _json_lines(file))
        else:
            documents = _lines(file)
        for document in documents:
            if document := document.strip():
                yield document


def _lines(file: Path, encoding: str = "utf-8") -> Iterator[str]:
    """The lines of a text file, which may be compressed."""
    try:
        with COMPRESSED.get(file.suffix, open)(file, mode="rt", encoding=encoding) as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"file {str(file)!r} cannot be read: not UTF-8 text ({error})") from error
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"file {str(file)!r} cannot be read: {error}") from error


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """What each line of JSON holds, with its place for messages; blank lines are skipped."""
    for number, line in enumerate(_lines(file, "utf-8-sig"), start=1):
        if line.strip():
            where = f"file {str(file)!r}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not a JSON object ({error})") from error
            yield where, row


@contextlib.contextmanager
def opened_parquet(file: Path) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """Open a Parquet file.

    Raises:
        ValueError: it is cut off, or something else; also while it is read.
    """
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"file {str(file)!r} is no whole Parquet file: {error}") from error


def _parquet_documents(file: Path, text_column: str) -> Iterator[str]:
    with opened_parquet(file) as table:
        if text_column not in table.schema_arrow.names:
            raise ValueError(
                f"file {str(file)!r} has no column {text_column!r}; it has {', '.join(table.schema_arrow.names)}"
            )
        batches = table.iter_batches(batch_size=ROWS, columns=[text_column])
        scalars = itertools.chain.from_iterable(batch.column(0) for batch in batches)
        for number, scalar in enumerate(scalars, start=1):
            where = f"file {str(file)!r}, row {number}"
            try:
                row = {text_column: scalar.as_py()}
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error})") from error
            yield text_of(row, text_column, where)


def text_of(row: Any, text_column: str, where: str) -> str:
    """The text of one row.

    Args:
        row: what was read.
        text_column: field with the text.
        where: what to call the row in a message.

    Returns:
        The text, with U+FFFD in the place of every lone surrogate.

    Raises:
        ValueError: the row is no object, or has no such field, or no text in it.
    """
    if not isinstance(row, dict) or text_column not in row:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: wanted an object with {text_column!r}; got {found}")
    if not isinstance(row[text_column], str):
        raise ValueError(f"{where}: {text_column!r} must be text; got {type(row[text_column]).__name__}")
    return replace_surrogates(row[text_column])


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a table of examples: `iter_rows` as a list."""
    return list(iter_rows(path))


def iter_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read a table of examples. Of .jsonl and .parquet, only a small part is in memory at a time.

    A byte-order mark is not part of the first name. White space around the names of columns, and around labels that
    are texts, is removed. A surrogate without its other half, which JSON can hold and a tokenizer refuses, becomes
    U+FFFD.

    Args:
        path: .jsonl (an object a line), .json (the same, or one list of objects), .parquet, .csv or .tsv (with a
            header line). Fields of .csv may be quoted, quotation marks in .tsv are part of the text.

    Yields:
        One dict a row; values of csv and tsv are strings.

    Raises:
        ValueError: for a missing file, unknown type, malformed line, a row of csv or tsv with more or fewer fields
            than the header, two columns of one name, or a file without rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"file {str(path)!r} does not exist")
    if path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"file {str(path)!r} has an unknown type; wanted one of {', '.join(TABLE_SUFFIXES)}")
    read = {".parquet": _parquet_rows, ".csv": _separated_rows, ".tsv": _separated_rows}.get(path.suffix, _json_rows)
    is_empty = True
    try:
        for row in read(path):
            is_empty = False
            yield _tidy(row, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"file {str(path)!r} is not UTF-8 text: {error}") from error
    if is_empty:
        raise ValueError(f"file {str(path)!r} is empty; expected at least one example")


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
        raise ValueError(f"file {str(path)!r} has two columns {twice!r}; expected every name once")


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".json" and next(_lines(path, "utf-8-sig"), "").startswith("["):
        found = _json_list(path)
    else:
        found = _json_lines(path)
    for where, row in found:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: wanted a JSON object; got {json.dumps(row)[:60]}")
        yield row


def _json_list(path: Path) -> list[tuple[str, Any]]:
    text = "".join(_lines(path, "utf-8-sig"))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"file {str(path)!r}: not a list of JSON objects ({error})") from error
    return [(f"file {str(path)!r}, entry {number}", row) for number, row in enumerate(rows, start=1)]


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with opened_parquet(path) as table:
        _check_names([name.strip() for name in table.schema_arrow.names], path)
        for batch in table.iter_batches(batch_size=ROWS):
            yield from batch.to_pylist()


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
                f"file {str(path)!r}, row {row.number - 1}: {row.actual_columns} fields where the header has "
                f"{row.expected_columns}: {row.text[:60]!r}; a text that holds the separator, a quotation mark or a "
                f"line break must {'not be in a .tsv' if tabs else 'stand in quotation marks'}"
            ) from error
        if "Empty CSV" in str(error):
            return []
        what = "not UTF-8 text" if "UTF8" in str(error) else "not a table"
        raise ValueError(f"file {str(path)!r} is {what}: {error}") from error
    _check_names([name.strip() for name in table.column_names], path)  # a dict would keep the last of two
    return table.to_pylist()
