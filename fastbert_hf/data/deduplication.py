"""Which documents were seen before: their digests on disk, so that memory does not grow with the corpus."""

import hashlib
import sqlite3
from pathlib import Path

from fastbert_hf.data.pieces import single_spaces

CACHE_KIBIBYTES = 64 * 1024


class SeenDocuments:
    """A set of documents, kept as 16-byte digests in a database file.

    Args:
        path: a new file; it holds nothing worth keeping afterwards.

    Raises:
        ValueError: the file cannot be made.
    """

    def __init__(self, path: Path):
        try:
            self.database = sqlite3.connect(path, isolation_level=None)
            # An interrupted preparation starts anew: no journal, no waiting for the disk.
            self.database.execute("PRAGMA journal_mode = OFF")
            self.database.execute("PRAGMA synchronous = OFF")
            self.database.execute(f"PRAGMA cache_size = -{CACHE_KIBIBYTES}")
            self.database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
            self.database.execute("BEGIN")
        except sqlite3.Error as error:
            raise ValueError(f"documents cannot be compared in {str(path)!r}: {error}") from error

    def add(self, document: str) -> bool:
        """Add a document; True if it is new, case and spaces apart.

        Raises:
            ValueError: the disk is full.
        """
        text = single_spaces(document.casefold())
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        try:
            return self.database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1
        except sqlite3.Error as error:
            raise ValueError(f"documents cannot be compared: {error}") from error

    def close(self) -> None:
        """Release the file."""
        self.database.close()
