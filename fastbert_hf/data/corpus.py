"""Reading text corpora and setting documents aside for validation."""

import hashlib
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

SUFFIXES = (".txt", ".txt.xz", ".xz")


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
        raise ValueError("no corpus file was given; at least one .txt or .xz file is wanted")
    for file in files:
        if not file.is_file():
            raise ValueError(f"corpus file {str(file)!r} does not exist or is not a file")
        if not file.name.endswith(SUFFIXES):
            raise ValueError(f"corpus file {str(file)!r} has an unknown type; wanted one of {', '.join(SUFFIXES)}")
    return files


def read_documents(paths: Iterable[str | Path]) -> Iterator[str]:
    """Read documents, one a line, in the order of files and lines.

    Args:
        paths: UTF-8 text files, plain (.txt) or compressed (.xz). Blank lines are skipped.

    Yields:
        One document at a time, without its line ending.

    Raises:
        ValueError: for a missing file, an unknown type, or content that is not UTF-8 text or not valid xz.
    """
    for file in check_corpus_files(paths):
        opener = lzma.open if file.suffix == ".xz" else open
        try:
            with opener(file, "rt", encoding="utf-8") as lines:
                for line in lines:
                    if document := line.strip():
                        yield document
        except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise ValueError(f"corpus file {str(file)!r} cannot be read as UTF-8 text: {error}") from error


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
