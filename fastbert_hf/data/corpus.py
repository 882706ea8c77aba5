"""Reading text corpora and setting documents aside for validation."""

import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fastbert_hf.data.cleaning import replace_surrogates

LINES = (".txt", ".jsonl")  # one document a line; each may be compressed
COMPRESSED = (".xz", ".zst")
SUFFIXES = (*LINES, *(kind + packed for kind in LINES for packed in COMPRESSED), *COMPRESSED, ".parquet")


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
        raise ValueError(f"no corpus file was given; at least one of {', '.join(SUFFIXES)} is wanted")
    for file in files:
        if not file.is_file():
            raise ValueError(f"corpus file {str(file)!r} does not exist or is not a file")
        if not file.name.endswith(SUFFIXES):
            raise ValueError(f"corpus file {str(file)!r} has an unknown type; wanted one of {', '.join(SUFFIXES)}")
    return files


def read_documents(paths: Iterable[str | Path], text_column: str = "text") -> Iterator[str]:
    """Read documents in the order of files and rows; only a small part is in memory at a time.

    Args:
        paths: UTF-8 text, one document a line (.txt), JSON objects, one a line (.jsonl), both also compressed (.xz,
            .zst; without .txt or .jsonl before it: text), or tables (.parquet). Blank documents are skipped; lone
            surrogates become U+FFFD.
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
            documents = _json_documents(file, text_column)
        else:
            documents = _lines(file)
        for document in documents:
            if document := document.strip():
                yield document


def _open_text(file: Path) -> IO[str]:
    if file.suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8")
    if file.suffix == ".zst":
        import io

        import pyarrow as pa

        return io.TextIOWrapper(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"), encoding="utf-8")
    return open(file, encoding="utf-8")


def _lines(file: Path) -> Iterator[str]:
    try:
        with _open_text(file) as lines:
            yield from lines
    except (UnicodeDecodeError, lzma.LZMAError, EOFError, OSError) as error:
        raise ValueError(f"corpus file {str(file)!r} cannot be read as UTF-8 text: {error}") from error


def _json_documents(file: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"corpus file {str(file)!r}, line {number}: not a JSON object ({error})") from error
        yield text_of(row, text_column, f"corpus file {str(file)!r}, line {number}")


def _parquet_documents(file: Path, text_column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if text_column not in table.schema_arrow.names:
                wanted = ", ".join(table.schema_arrow.names)
                raise ValueError(f"corpus file {str(file)!r} has no column {text_column!r}; it has {wanted}")
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=[text_column]):
                for scalar in batch.column(0):
                    number += 1
                    try:
                        value = scalar.as_py()
                    except UnicodeDecodeError as error:
                        raise ValueError(f"corpus file {str(file)!r}, row {number}: not UTF-8 ({error})") from error
                    yield text_of({text_column: value}, text_column, f"corpus file {str(file)!r}, row {number}")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"corpus file {str(file)!r} is no whole Parquet file: {error}") from error


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


def is_held_out(key: str, share: float) -> bool:
    """Decide whether a document belongs to the validation part.

    The decision depends on the document's key alone, so it does not change when a corpus grows or is reordered.

    Args:
        key: what identifies the document, for example its text or the file it came from.
        share: part of all keys to set aside, 0 to 1.

    Returns:
        True for about `share` of all keys.
    """
    # The prefix keeps the decision independent of other uses of a key's hash, such as the order of a corpus.
    digest = hashlib.sha1(b"validation " + key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_documents(documents: Iterable[str], validation_share: float) -> tuple[list[str], list[str]]:
    """Split documents into training and validation parts by the hash of their text.

    Equal documents always fall on the same side, so an exact duplicate never leaks into validation.

    Args:
        documents: the corpus.
        validation_share: part to set aside, above 0 and below 1.

    Returns:
        The training documents and the validation documents, both in corpus order.

    Raises:
        ValueError: if the share is out of range or the corpus is empty.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must lie between 0 and 1, both excluded; got {validation_share}")
    train: list[str] = []
    validation: list[str] = []
    for document in documents:
        (validation if is_held_out(document, validation_share) else train).append(document)
    if not train and not validation:
        raise ValueError("the corpus is empty: no line with text was found")
    return train, validation
