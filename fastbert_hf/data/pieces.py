"""Long documents in pieces: what is computed from a document whole takes many times its size in memory."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE_CHARACTERS = 500_000  # the tokenizer takes over 100 bytes for each
NEAR = 4096  # characters before the end of a piece that are searched for white space first
CONTEXT = 256  # characters on each side of a cut that are encoded to see whether it changes a token
ATTEMPTS = 64  # places tried for one cut; a tokenizer that none of them suits gets the document whole
_GAP = re.compile(r"(?<=\S)\s(?=\S)")  # white space of one character: none of it is left at the end of a piece

Cut = Callable[[str, str], int | None]


def pieces(document: str, cut: Cut = lambda before, after: 0, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long document at white space.

    Args:
        document: text.
        cut: called with the text before a white space and the text from it on, up to `CONTEXT` characters each; how
            many characters of the latter belong to neither piece, or None to try elsewhere.
        limit: characters of a piece, about; pieces are longer where there is no white space.

    Yields:
        The document in order; joined, it is the same text apart from the characters that `cut` drops.
    """
    start = 0
    while len(document) - start > limit:
        for place in itertools.islice(_gaps(document, start, start + limit), ATTEMPTS):
            dropped = cut(document[max(start, place - CONTEXT) : place], document[place : place + CONTEXT])
            if dropped is not None:
                yield document[start:place]
                start = place + dropped
                break
        else:
            break
    yield document[start:]


def _gaps(document: str, start: int, end: int) -> Iterator[int]:
    """Places of white space: from `end` backwards, then onwards."""
    near = max(start + 1, end - NEAR)
    for match in reversed(list(_GAP.finditer(document, near, end))):
        yield match.start()
    for match in _GAP.finditer(document, end):
        yield match.start()


def cut_for(tokenizer: "Tokenizer") -> Cut:
    """How to cut so that the pieces have the tokens of the whole.

    Most tokenizers split at white space before anything else, and some count it as the beginning of the next word.
    Each cut is therefore tried on the text around it.

    Args:
        tokenizer: of the tokenizers library.

    Returns:
        For `pieces`: 0 if a piece may begin with white space, 1 if it must begin after it, None if it changes tokens.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def cut(before: str, after: str) -> int | None:
        whole, left = encode(before + after), encode(before)
        return next((dropped for dropped in (0, 1) if left + encode(after[dropped:]) == whole), None)

    return cut


def single_spaces(text: str) -> str:
    """Text without white space at its ends, and one space in place of all other white space."""
    return " ".join(" ".join(piece.split()) for piece in pieces(text))
