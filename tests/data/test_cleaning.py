"""Text that tokenizers take."""

import pytest

from fastbert_hf.data.cleaning import replace_surrogates


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
