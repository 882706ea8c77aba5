"""Where a corpus comes from: files on this machine, or a dataset of the Hub, streamed or not; text or token ids."""

import contextlib
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastbert_hf.data.pieces import single_spaces
from fastbert_hf.data.readers import ROWS, check_corpus_files, opened_parquet, read_documents, text_of
from fastbert_hf.files import file_digest

TOKENIZED = "input_ids"  # column of a dataset that is tokenized and packed already
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Source(Protocol):
    """Text, or sequences of token ids, that can be read again and again."""

    def describe(self) -> dict[str, Any]:
        """What identifies the source, for the manifest: no path of this machine."""

    def is_tokenized(self) -> bool:
        """Whether it holds sequences instead of documents."""

    def documents(self) -> Iterator[str]:
        """Its documents, one at a time."""

    def sequences(self, seq_length: int, vocab_size: int) -> Iterator[np.ndarray]:
        """Its sequences: (n, T) integer arrays."""


@dataclass(frozen=True)
class LocalFile:
    """A file of text, or a Parquet file of token ids.

    Attributes:
        path: see `read_documents`.
        text_column: field with the text.
        license: what its text may be used for, for the model card.
    """

    path: Path
    text_column: str = "text"
    license: str | None = None

    def describe(self) -> dict[str, Any]:
        """Name, size, digest and licence; the folder it lies in says nothing elsewhere."""
        check_corpus_files([self.path])
        about = {"name": self.path.name, "bytes": self.path.stat().st_size, "sha256": file_digest(self.path)}
        return about | {"text_column": self.text_column, "license": self.license}

    def is_tokenized(self) -> bool:
        """Whether it is a Parquet file with token ids and no text."""
        if self.path.suffix != ".parquet":
            return False
        with opened_parquet(self.path) as table:
            columns = table.schema_arrow.names
        return TOKENIZED in columns and self.text_column not in columns

    def documents(self) -> Iterator[str]:
        """The file's documents."""
        return read_documents([self.path], self.text_column)

    def sequences(self, seq_length: int, vocab_size: int) -> Iterator[np.ndarray]:
        """The file's sequences."""
        with opened_parquet(self.path) as table:
            for batch in table.iter_batches(batch_size=ROWS, columns=[TOKENIZED]):
                yield _checked(batch.column(0).to_pylist(), seq_length, vocab_size, str(self.path))


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub, or a folder in the form of one.

    Attributes:
        name: NAMESPACE/NAME, or a folder.
        config: its configuration, where it has several.
        split: which part.
        revision: branch, tag or commit; what it stands for is looked up once.
        streaming: read it over the network instead of downloading it first.
        text_column: column with the text.
        max_documents: take the first rows only.
        license: what its text may be used for, for the model card.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    text_column: str = "text"
    max_documents: int | None = None
    license: str | None = None

    def describe(self) -> dict[str, Any]:
        """Name, split and commit; a folder goes by its own name and the digest of its files.

        Raises:
            ValueError: it cannot be found, or nobody can say which commit it is.
        """
        about = {"name": self.name, "config": self.config, "split": self.split, "revision": None}
        if self._is_folder:
            about |= {"name": Path(self.name).absolute().name, "sha256": self._files_digest()}
        else:
            about["revision"] = self.revision if _COMMIT.fullmatch(self.revision or "") else self._commit
        return about | {
            "text_column": self.text_column,
            "max_documents": self.max_documents,
            "license": self.license,
        }

    @property
    def _is_folder(self) -> bool:
        return Path(self.name).is_dir()

    @functools.cached_property
    def _builder(self):
        """What the library found under the name; the data is not there yet."""
        from datasets import load_dataset_builder

        with self._named_errors("loaded"):
            return load_dataset_builder(self.name, self.config, revision=self.revision)

    @functools.cached_property
    def _commit(self) -> str:
        """The commit that is read from now on: a branch may move, and without network the library reads its cache."""
        commit = self._builder.hash or ""
        if not _COMMIT.fullmatch(commit):
            raise ValueError(
                f"dataset {self.name!r}: the commit of revision {self.revision!r} is not known without the Hub; give "
                "--dataset_revision COMMIT, or try again when the Hub can be reached"
            )
        if _COMMIT.fullmatch(self.revision or "") and commit != self.revision:
            raise ValueError(
                f"dataset {self.name!r} cannot be loaded at {self.revision}: the Hub cannot be reached, and the "
                f"cache holds {commit}"
            )
        return commit

    def _files_digest(self) -> str:
        """SHA-256 over names and contents of the files that are read from a folder, in their order."""
        files = self._builder.config.data_files
        chosen = files.get(self.split) or [file for split in files.values() for file in split]
        digest = hashlib.sha256()
        for file in chosen:
            path = Path(str(file))
            digest.update(f"{os.path.relpath(path, Path(self.name).absolute())} {file_digest(path)}\n".encode())
        return digest.hexdigest()

    def is_tokenized(self) -> bool:
        """Whether it has token ids and no text."""
        columns = self._open().column_names
        if columns is None:  # some streams tell only with their first row
            columns = list(next(self._rows(), {}))
        if self.text_column in columns:
            return False
        if TOKENIZED not in columns:
            raise ValueError(
                f"dataset {self.name!r} has neither a column {self.text_column!r} nor {TOKENIZED!r}; "
                f"it has {', '.join(columns)}"
            )
        return True

    def documents(self) -> Iterator[str]:
        """The dataset's documents."""
        for number, row in enumerate(self._rows(), start=1):
            if document := single_spaces(text_of(row, self.text_column, f"dataset {self.name!r}, row {number}")):
                yield document

    def sequences(self, seq_length: int, vocab_size: int) -> Iterator[np.ndarray]:
        """The dataset's sequences."""
        waiting = []
        for row in self._rows():
            waiting.append(row[TOKENIZED])
            if len(waiting) == ROWS:
                yield _checked(waiting, seq_length, vocab_size, self.name)
                waiting = []
        if waiting:
            yield _checked(waiting, seq_length, vocab_size, self.name)

    def _rows(self) -> Iterator[dict[str, Any]]:
        with self._named_errors("read"):
            yield from itertools.islice(self._open(), self.max_documents)

    def _open(self):
        from datasets import load_dataset

        revision = None if self._is_folder else self._commit
        with self._named_errors("loaded"):
            return load_dataset(self.name, self.config, split=self.split, revision=revision, streaming=self.streaming)

    @contextlib.contextmanager
    def _named_errors(self, what: str) -> Iterator[None]:
        """Turn what the library says about bad rows, which names neither dataset nor cause, into one sentence."""
        from datasets.exceptions import DatasetsError

        try:
            yield
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            reason = str(error.__cause__ or error).strip() or type(error).__name__
            raise ValueError(f"dataset {self.name!r} cannot be {what}: {reason.splitlines()[0]}") from error


def _checked(rows: list, seq_length: int, vocab_size: int, name: str) -> np.ndarray:
    """Rows of token ids as an (n, T) array.

    Raises:
        ValueError: a row has another length, or an id that is not in the vocabulary.
    """
    lengths = {len(row) if row is not None else 0 for row in rows}
    if lengths != {seq_length}:
        raise ValueError(
            f"{name!r} has sequences of {min(lengths)} to {max(lengths)} tokens; max_seq_length is {seq_length}"
        )
    array = np.asarray(rows, dtype=np.int64)
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(
            f"{name!r} has token ids from {array.min()} to {array.max()}; the tokenizer has {vocab_size} entries"
        )
    return array
