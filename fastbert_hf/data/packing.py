"""Documents to full sequences of token ids, without padding."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastbert_hf.data.pieces import Cut, cut_for, pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PIECES_PER_CALL = 1000  # bounds memory and lets the tokenizer work on several at once
CHARACTERS_PER_CALL = 2_000_000  # the same for long documents: a token takes over 100 bytes until its id is read
SEQUENCES_AT_ONCE = 1024


def check_seq_length(seq_length: int) -> None:
    """Check a sequence length.

    Raises:
        ValueError: if it is below 8.
    """
    if seq_length < 8:
        raise ValueError(f"max_seq_length must be at least 8; got {seq_length}")


def tokenize_documents(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", progress: bool = False, name: str = "corpus"
) -> Iterator[np.ndarray]:
    """Tokenize documents in order, each followed by the separator; on all cores if TOKENIZERS_PARALLELISM allows it.

    Long documents are tokenized in pieces, cut at white space where that changes no token (`pieces`).

    Args:
        documents: text.
        tokenizer: a fast tokenizer with a separator token.
        progress: show a progress bar in documents.
        name: what the text is, for the bar.

    Yields:
        (n,) int32 arrays, one a document, or several in order for a long one.
    """
    from tqdm.auto import tqdm

    documents = iter(tqdm(documents, desc=f"tokenizing {name}", unit=" documents", disable=not progress))
    # The library underneath: no masks, types and offsets that nobody reads, and long documents are no mistake.
    backend = _without_limits(tokenizer.backend_tokenizer)
    has_tokens = False  # whether the document that a piece belongs to has any so far
    for chunk in _chunks(documents, cut_for(backend)):
        encodings = backend.encode_batch_fast([text for text, _ in chunk], add_special_tokens=False)
        for encoding, (_, is_last) in zip(encodings, chunk):
            ids = encoding.ids
            has_tokens = has_tokens or bool(ids)
            if is_last and has_tokens:
                ids.append(tokenizer.sep_token_id)
                has_tokens = False
            if ids:
                yield np.asarray(ids, dtype=np.int32)


def _without_limits(backend: "Tokenizer") -> "Tokenizer":
    """The tokenizer, or a copy that does not cut or pad where it was saved with a length."""
    if backend.truncation is None and backend.padding is None:
        return backend
    backend = type(backend).from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _chunks(documents: Iterator[str], cut: Cut) -> Iterator[list[tuple[str, bool]]]:
    """As many pieces as are tokenized at once, each with whether it is the last of its document."""
    chunk: list[tuple[str, bool]] = []
    characters = 0
    for document in documents:
        parts = pieces(document, cut)
        part = next(parts)
        while part is not None:
            following = next(parts, None)
            chunk.append((part, following is None))
            characters += len(part)
            part = following
            if characters >= CHARACTERS_PER_CALL or len(chunk) == PIECES_PER_CALL:
                yield chunk
                chunk, characters = [], 0
    if chunk:
        yield chunk


class Packer:
    """Joins documents and cuts the result into sequences of exactly T tokens.

    Every sequence begins with [CLS], as every fine-tuning input does; documents end with [SEP] and run on into
    the next sequence. The remainder that does not fill a sequence is dropped, so no batch needs padding or a mask.

    Args:
        tokenizer: a tokenizer with a cls token.
        seq_length: tokens per sequence T, [CLS] included.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", seq_length: int):
        check_seq_length(seq_length)
        self.cls_token_id, self.seq_length = tokenizer.cls_token_id, seq_length

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
