"""The published checkpoint's 755 MB load in bounded memory. Times are printed: this machine has other work."""

import sys

import pytest

from tests.hub.published_size import describe, measure, write_published


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="private memory is read from /proc")
def test_loading_grows_private_memory_by_little_more_than_the_weights(tmp_path):
    write_published(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == 755_365_540  # as published
    figures = measure(tmp_path, "AutoModelForMaskedLM")
    print(describe("AutoModelForMaskedLM", figures))
    assert figures["unique_bytes"] == 163_671_025 * 4
    assert figures["peak"] <= 1.1
