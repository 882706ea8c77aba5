"""Text that tokenizers take."""

import pytest

from fastbert_hf.data.cleaning import clean_document, replace_surrogates


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain", "plain"),
        ("", ""),
        ("caf\u00e9 \U0001f600 \ufffd", "caf\u00e9 \U0001f600 \ufffd"),
        ("cut \ud83d here", "cut \ufffd here"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("\ud83d \udfff", "\ufffd \ufffd"),
    ],
)
def test_lone_surrogates_become_the_replacement_character(text, expected):
    assert replace_surrogates(text) == expected
    expected.encode("utf-8")


def test_cleaning_keeps_prose_and_drops_tables_and_scraps():
    prose = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
    assert clean_document(f"\ufeff{prose}\x07\n\n {prose}") == f"{prose} {prose}".replace("  ", " ").strip()
    assert clean_document("Cafe\u0301 " + prose).startswith("Caf\u00e9 ")
    assert clean_document("too short") is None
    assert clean_document("12.5 | 13.7 | 0x7f | " * 40) is None
