"""The comparison of int8 with float32 checks its results. No test asserts a time."""

import pytest
import torch

from fastbert_hf.backends_fastbert import chosen_backend
from fastbert_hf.benchmarks import int8


class OffByAHundredth(torch.nn.Module):
    """Another result than the reference's wherever a backend of its own choice computes."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * (1 if chosen_backend() == "reference" else 1.01)


@pytest.mark.parametrize("form", ["leaves", "nodes"])
@torch.no_grad()
def test_a_wrong_layer_is_a_mismatch(form):
    layer, quantized = int8.make_layers(form, 32)
    x = torch.randn(40, 32)
    assert int8.check(quantized, layer, x).startswith("ok")
    assert int8.check(OffByAHundredth(quantized), layer, x).startswith("MISMATCH")


@pytest.mark.parametrize(("form", "tokens"), [("leaves", 1), ("leaves", 7), ("nodes", 7)])
def test_rows_name_both_and_their_match(form, tokens):
    rows = int8.forward_rows(form, 32, tokens, 1, rounds=2)
    assert [row.entry for row in rows] == ["float32", "int8"] and {row.baseline for row in rows} == {"float32"}
    assert rows[1].match.startswith("ok") and "from float32" in rows[1].match and rows[1].tokens == tokens
