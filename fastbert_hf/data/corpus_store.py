"""A prepared corpus: packed sequences in Arrow shards, a tokenizer, and a manifest that is written last."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastbert_hf.files import file_digest, write_text

MANIFEST, COUNTS, TOKENIZER = "manifest.json", "token_counts.npy", "tokenizer"
FORMAT = 1
ROWS_PER_BATCH = 1024


def write_shards(
    folder: Path, split: str, arrays: Iterable[np.ndarray], vocab_size: int, rows_per_shard: int
) -> list[dict[str, Any]]:
    """Write packed sequences as Arrow stream files that memory-map and that `datasets.Dataset.from_file` opens.

    Args:
        folder: where; it exists.
        split: first part of the file names.
        arrays: (n, T) integer arrays in order.
        vocab_size: V; ids take two bytes where they fit.
        rows_per_shard: sequences of a file.

    Returns:
        One entry a file: name, sequences, bytes, sha256.
    """
    import pyarrow as pa

    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
    entries: list[dict[str, Any]] = []
    for number, shard in enumerate(_shards(arrays, rows_per_shard)):
        path = folder / f"{split}-{number:05d}.arrow"
        rows, writer = 0, None
        with pa.OSFile(str(path), "wb") as sink:
            for block in shard:
                values = pa.array(block.astype(dtype).reshape(-1))  # (n, T) -> (n*T,)
                column = pa.FixedSizeListArray.from_arrays(values, block.shape[1])
                batch = pa.record_batch([column], names=["input_ids"])
                writer = writer or pa.ipc.new_stream(sink, batch.schema)
                writer.write_batch(batch)
                rows += len(block)
            writer.close()
        entry = {"file": path.name, "sequences": rows, "bytes": path.stat().st_size, "sha256": file_digest(path)}
        entries.append(entry)
    return entries


def _shards(arrays: Iterable[np.ndarray], rows_per_shard: int) -> Iterator[Iterator[np.ndarray]]:
    """Group rows into shards, each an iterator of blocks; a shard is used up before the next is asked for."""
    blocks = (block for array in arrays for block in _blocks(array))
    waiting: list[np.ndarray] = []

    def one_shard() -> Iterator[np.ndarray]:
        room = rows_per_shard
        while room and (block := waiting.pop() if waiting else next(blocks, None)) is not None:
            if len(block) > room:
                waiting.append(block[room:])
            yield block[:room]
            room -= len(block[:room])

    while True:
        if not waiting:
            block = next(blocks, None)
            if block is None:
                return
            waiting.append(block)
        yield one_shard()


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), ROWS_PER_BATCH):
        yield array[start : start + ROWS_PER_BATCH]


class ShardedSequences(Dataset):
    """Equal-length sequences in memory-mapped Arrow files; nothing is held in memory.

    Args:
        files: the shards in order.
        limit: use the first sequences only.
    """

    def __init__(self, files: list[Path], limit: int | None = None):
        self.files = files
        self._open()
        self.length = int(self.ends[-1]) if limit is None else min(limit, int(self.ends[-1]))

    def _open(self) -> None:
        arrays = [array for file in self.files for array in _read_shard(file)]
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __getstate__(self) -> dict[str, Any]:
        """Loader processes that are not forked map the files themselves."""
        return {"files": self.files, "length": self.length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self.length

    def row(self, index: int) -> np.ndarray:
        """One sequence: (T,) integers, in the files' own type."""
        if not 0 <= index < self.length:
            raise IndexError(f"sequence {index} of {self.length}")
        place = int(np.searchsorted(self.ends, index, side="right"))
        return self.arrays[place][index - self.ends[place]]  # counted from the array's end

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sequence: {"input_ids": (T,) int64}."""
        return {"input_ids": torch.from_numpy(self.row(index).astype(np.int64))}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Several sequences at once, as a DataLoader asks for them: {"input_ids": (B, T) int64}."""
        places = np.searchsorted(self.ends, indices, side="right")
        rows = np.empty((len(indices), self.arrays[0].shape[1]), dtype=np.int64)  # (B, T)
        for row, index, place in zip(rows, indices, places):
            row[:] = self.arrays[place][index - self.ends[place]]  # counted from the array's end
        return {"input_ids": torch.from_numpy(rows)}


def _read_shard(path: Path) -> list[np.ndarray]:
    """The record batches of a shard as (n, T) arrays that lie in the mapped file."""
    import pyarrow as pa

    try:
        column = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().column("input_ids")
        width = column.type.list_size
        return [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, width) for chunk in column.chunks]
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise ValueError(f"shard {str(path)!r} cannot be read: {error}") from error


class StoredCorpus:
    """What `scripts/prepare_corpus.py` made, opened for training.

    Args:
        folder: its output folder.
        verify: compare every file with the manifest's SHA-256, not only its size.

    Attributes:
        manifest: the folder's manifest.json.

    Raises:
        ValueError: no manifest (the preparation was interrupted), or a missing, cut off or changed shard.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if self.manifest is None:
            raise ValueError(
                f"{str(folder)!r} holds no {MANIFEST}: it is no prepared corpus, or its preparation was interrupted; "
                "scripts/prepare_corpus.py makes one"
            )
        problem = damage(self.folder, self.manifest, verify)
        if problem:
            raise ValueError(f"the corpus in {str(folder)!r} is damaged: {problem}; prepare it again")

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer lies."""
        return self.folder / TOKENIZER

    @property
    def seq_length(self) -> int:
        """Tokens per sequence, T."""
        return self.manifest["settings"]["max_seq_length"]

    def sequences(self, split: str, limit: int | None = None) -> ShardedSequences:
        """The sequences of "train" or "validation".

        Raises:
            ValueError: the split is empty.
        """
        files = [self.folder / entry["file"] for entry in self.manifest["shards"][split]]
        if not files:
            advice = "; prepare it with more held-out text" if split == "validation" else ""
            raise ValueError(f"the corpus in {str(self.folder)!r} has no {split} sequences{advice}")
        return ShardedSequences(files, limit)

    def token_counts(self) -> np.ndarray:
        """(V,) int64: how often each id occurs in the training sequences, [CLS] left out."""
        return np.load(self.folder / COUNTS, allow_pickle=False)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest, or None if there is none of this format."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from error
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Declare a folder complete; returns the manifest as it is read again."""
    manifest = {"format": FORMAT, **manifest}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def damage(folder: Path, manifest: dict[str, Any], verify: bool) -> str | None:
    """What is wrong with a prepared folder's files, or None."""
    for entry in [entry for entries in manifest["shards"].values() for entry in entries]:
        path = folder / entry["file"]
        if not path.is_file():
            return f"{entry['file']} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{entry['file']} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if verify and file_digest(path) != entry["sha256"]:
            return f"{entry['file']} has changed since it was written (SHA-256 differs)"
    for name in (COUNTS, f"{TOKENIZER}/tokenizer.json"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    return None
