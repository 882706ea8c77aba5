"""Text that every tokenizer takes, and optional cleaning of raw documents: what is not running text goes."""

import re
import unicodedata

from fastbert_hf.data.pieces import single_spaces

MIN_CHARACTERS = 200
MIN_LETTER_SHARE = 0.65  # letters and spaces among all characters; tables, code and digits have less
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """Put U+FFFD, the replacement character, in the place of every lone surrogate.

    JSON may hold lone surrogates (one half of a cut emoji), and Python keeps them. They are not characters: UTF-8
    cannot hold them, and tokenizers refuse them. Every reader of text calls this.

    Args:
        text: any text.

    Returns:
        Text of the same length that UTF-8 can hold.
    """
    return _SURROGATE.sub("\ufffd", text)


def clean_document(document: str) -> str | None:
    """Clean one document.

    Args:
        document: raw text.

    Returns:
        The text in Unicode's composed form, without control characters, spaces single; None if less than
        `MIN_CHARACTERS` are left or under `MIN_LETTER_SHARE` of them are letters or spaces.
    """
    text = single_spaces(_CONTROL.sub(" ", unicodedata.normalize("NFC", document)))
    if len(text) < MIN_CHARACTERS:
        return None
    letters = sum(character.isalpha() or character == " " for character in text)
    return text if letters >= MIN_LETTER_SHARE * len(text) else None
