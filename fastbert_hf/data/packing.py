"""Documents to full sequences of token ids, without padding."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 1000  # bounds memory and lets the tokenizer work on several at once
CHARACTERS_PER_CALL = 2_000_000  # the same for long documents: a token takes over 100 bytes until its id is read
SEQUENCES_AT_ONCE = 1024


def check_seq_length(seq_length: int) -> None:
    """Check a sequence length.

    Raises:
        ValueError: if it is below 8.
    """
    if seq_length < 8:
        raise ValueError(f"max_seq_length must be at least 8; got {seq_length}")


class PackedSequences(Dataset):
    """Equal-length sequences of token ids.

    Args:
        input_ids: (S, T) integer array, S sequences of T tokens.
    """

    def __init__(self, input_ids: np.ndarray):
        self.input_ids = input_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sequence: {"input_ids": (T,) int64}."""
        return {"input_ids": torch.from_numpy(self.input_ids[index].astype(np.int64))}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Several sequences at once, as a DataLoader asks for them: {"input_ids": (B, T) int64}."""
        return {"input_ids": torch.from_numpy(self.input_ids[indices].astype(np.int64))}


def tokenize(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", progress: bool = False, name: str = "corpus"
) -> Iterator[np.ndarray]:
    """Tokenize documents in order, each followed by the separator; on all cores if TOKENIZERS_PARALLELISM allows it.

    Args:
        documents: text.
        tokenizer: a fast tokenizer with a separator token.
        progress: show a progress bar in documents.
        name: what the text is, for the bar.

    Yields:
        (n,) int32 arrays, one a document.
    """
    from tqdm.auto import tqdm

    documents = iter(tqdm(documents, desc=f"tokenizing {name}", unit=" documents", disable=not progress))
    while chunk := _chunk(documents):
        # The library underneath: no masks, types and offsets that nobody reads, and long documents are no mistake.
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
            if encoding.ids:
                yield np.asarray([*encoding.ids, tokenizer.sep_token_id], dtype=np.int32)


def _chunk(documents: Iterator[str]) -> list[str]:
    """The next documents, as many as are tokenized at once."""
    chunk: list[str] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document)
        if characters >= CHARACTERS_PER_CALL or len(chunk) == DOCUMENTS_PER_CALL:
            break
    return chunk


class Packer:
    """Joins documents and cuts the result into sequences of exactly T tokens.

    Every sequence begins with [CLS], as every fine-tuning input does; documents end with [SEP] and run on into
    the next sequence. The remainder that does not fill a sequence is dropped, so no batch needs padding or a mask.

    Args:
        tokenizer: a tokenizer with a cls token.
        seq_length: tokens per sequence T, [CLS] included.

    Attributes:
        tokens: how many came in.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", seq_length: int):
        check_seq_length(seq_length)
        self.cls_token_id, self.seq_length = tokenizer.cls_token_id, seq_length
        self.tokens = 0

    def pack(self, documents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Pack documents.

        Args:
            documents: (n,) int32 token ids each.

        Yields:
            (S, T) int32, as many sequences as were full; what is left over waits for the next documents.
        """
        body = self.seq_length - 1
        waiting: list[np.ndarray] = []
        size = 0
        for ids in documents:
            self.tokens += len(ids)
            waiting.append(ids)
            size += len(ids)
            if size >= body * SEQUENCES_AT_ONCE:
                tokens = np.concatenate(waiting)
                full = size // body * body
                yield self._cut(tokens[:full])
                waiting, size = [tokens[full:]], size - full
        if size >= body:
            yield self._cut(np.concatenate(waiting)[: size // body * body])

    def _cut(self, tokens: np.ndarray) -> np.ndarray:
        rows = tokens.reshape(-1, self.seq_length - 1)  # (S*(T-1),) -> (S, T-1)
        cls_column = np.full((len(rows), 1), self.cls_token_id, dtype=np.int32)
        return np.concatenate([cls_column, rows], axis=1)  # (S, T)


def pack_documents(
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    seq_length: int,
    progress: bool = False,
    name: str = "corpus",
) -> PackedSequences:
    """Tokenize and pack documents into memory.

    Args:
        documents: text.
        tokenizer: a fast tokenizer with cls and sep tokens.
        seq_length: tokens per sequence, [CLS] included.
        progress: show a progress bar.
        name: what the text is, for messages.

    Returns:
        S sequences of (T,) tokens; S may be 0.

    Raises:
        ValueError: if `seq_length` is below 8 or the corpus holds no token at all.
    """
    packer = Packer(tokenizer, seq_length)
    arrays = list(packer.pack(tokenize(documents, tokenizer, progress, name)))
    if not packer.tokens:
        raise ValueError(f"the {name} is empty: it holds no token")
    return PackedSequences(np.concatenate(arrays) if arrays else np.empty((0, seq_length), dtype=np.int32))
