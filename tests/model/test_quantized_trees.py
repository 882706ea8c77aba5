"""Models whose trees have int8 weights."""

import pytest
import torch

from fastbert_hf import (
    FastBertModel,
    FastFeedForward,
    LeafFeedForward,
    QuantizedFastFeedForward,
    QuantizedLeafFeedForward,
)
from tests.model.test_modeling import LEAF_TREES, batch, build

QUANTIZED = {FastFeedForward: QuantizedFastFeedForward, LeafFeedForward: QuantizedLeafFeedForward}


def quantize(encoder: FastBertModel) -> None:
    for layer in encoder.layers:
        layer.ffn = QUANTIZED[type(layer.ffn)].from_float(layer.ffn)


@pytest.mark.parametrize("options", [{}, LEAF_TREES], ids=["nodes", "leaves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_model_with_int8_trees_stays_close_and_its_state_fills_an_empty_one(options, dtype):
    model = build(hidden_size=64, initializer_range=0.1, **options).eval()
    inputs = batch()
    expected = model(**inputs).logits
    quantize(model.fastbert)
    assert not torch.equal(model(**inputs).logits, expected)
    model = model.to(dtype)
    logits = model(**inputs).logits
    assert logits.dtype == dtype
    tolerance = 0.03 if dtype == torch.float32 else 0.1
    assert (logits.float() - expected).norm() < tolerance * expected.norm()

    other = build(hidden_size=64, initializer_range=0.1, **options).eval()
    quantize(other.fastbert)
    for layer in other.fastbert.layers:
        for buffer in layer.ffn.buffers():
            buffer.zero_()
    other.to(dtype).load_state_dict(model.state_dict())
    assert torch.equal(other(**inputs).logits, logits)
