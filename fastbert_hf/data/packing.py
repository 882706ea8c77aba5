"""Documents to full sequences of token ids, without padding."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 1000  # bounds memory and lets the tokenizer work on several at once


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


def token_stream(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", progress: bool = False
) -> Iterator[np.ndarray]:
    """Tokenize documents in order, each followed by the separator.

    Args:
        documents: text.
        tokenizer: a fast tokenizer with a separator token.
        progress: show a progress bar in documents.

    Yields:
        (n,) int32 arrays, one a document.
    """
    from tqdm.auto import tqdm

    documents = iter(tqdm(documents, desc="tokenizing", unit=" documents", disable=not progress))
    while chunk := list(itertools.islice(documents, DOCUMENTS_PER_CALL)):
        # verbose=False: whole documents are longer than the model's limit, and are cut below.
        encoded = tokenizer(
            chunk,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids in encoded["input_ids"]:
            if ids:
                yield np.asarray([*ids, tokenizer.sep_token_id], dtype=np.int32)


def pack_documents(
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    seq_length: int,
    progress: bool = False,
    name: str = "corpus",
) -> PackedSequences:
    """Join documents and cut the result into sequences of exactly `seq_length` tokens.

    Every sequence begins with [CLS], as every fine-tuning input does; documents end with [SEP] and run on into
    the next sequence. The remainder that does not fill a sequence is dropped, so no batch needs padding or a mask.

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
    check_seq_length(seq_length)
    arrays = list(token_stream(documents, tokenizer, progress))
    if not arrays:
        raise ValueError(f"the {name} is empty: it holds no token")
    tokens = np.concatenate(arrays)  # (tokens,)
    body = seq_length - 1
    sequences = len(tokens) // body
    body_ids = tokens[: sequences * body].reshape(sequences, body)  # (tokens,) -> (S, T-1)
    cls_column = np.full((sequences, 1), tokenizer.cls_token_id, dtype=np.int32)
    return PackedSequences(np.concatenate([cls_column, body_ids], axis=1))  # (S, T)
