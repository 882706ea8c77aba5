"""Digests of seen documents live on disk."""

import pytest

from fastbert_hf.data.deduplication import SeenDocuments


def test_digests_live_on_disk(tmp_path):
    seen = SeenDocuments(tmp_path / "seen.sqlite")
    assert [seen.add(text) for text in ("a b", "A  b", "c", "a b")] == [True, False, True, False]
    seen.close()
    assert (tmp_path / "seen.sqlite").stat().st_size > 0
    with pytest.raises(ValueError, match="cannot be compared"):
        SeenDocuments(tmp_path / "absent" / "seen.sqlite")
