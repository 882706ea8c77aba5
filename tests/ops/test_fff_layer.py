"""FastFeedForward: shapes, initialisation, errors."""

import pytest
import torch

from fastbert_hf import FastFeedForward
from tests.oracle import dense_and_mask


def test_any_leading_shape_and_route():
    layer = FastFeedForward(8, 6, depth=3, trees=2)
    x = torch.randn(2, 3, 4, 8)
    y, nodes = layer(x), layer.route(x)
    expected, expected_nodes = dense_and_mask(
        x.reshape(-1, 8), layer.weight_in, layer.bias_in, layer.weight_out, trees=2
    )
    assert y.shape == (2, 3, 4, 6) and nodes.shape == (2, 3, 4, 2, 4) and nodes.dtype == torch.int64
    torch.testing.assert_close(y.view(-1, 6), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(nodes.view(-1, 2, 4), expected_nodes)
    assert layer(x[0, 0, 0]).shape == (6,) and layer(torch.zeros(0, 8)).shape == (0, 6)


def test_neurons_are_counted():
    layer = FastFeedForward(8, 8, depth=11)
    assert (layer.neurons, layer.neurons_per_token) == (4095, 12)
    assert "neurons_per_token=12 of 4095" in repr(layer)


def test_initialisation_is_normal_with_zero_bias():
    layer = FastFeedForward(64, 64, depth=7, initializer_range=0.5)
    assert abs(layer.weight_in.std().item() - 0.5) < 0.02 and abs(layer.weight_out.std().item() - 0.5) < 0.02
    assert (layer.bias_in == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": -1}, "depth is -1; expected an integer of at least 0 and at most 24"),
        ({"trees": 0}, "trees is 0; expected an integer of at least 1"),
        ({"depth": "3"}, "depth is '3'; expected an integer"),
        ({"depth": 2.5}, "depth is 2.5; expected an integer"),
        ({"depth": 60}, "depth is 60; expected an integer of at least 0 and at most 24"),
        ({"trees": 1.0}, "trees is 1.0; expected an integer"),
        ({"in_features": 0}, "in_features is 0"),
        ({"activation": "swish"}, "activation is 'swish'; expected one of gelu"),
    ],
)
def test_bad_sizes_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        FastFeedForward(**({"in_features": 8, "out_features": 8, "depth": 2} | arguments))


def test_wrong_width_raises():
    with pytest.raises(ValueError, match="7"):
        FastFeedForward(8, 8, depth=2)(torch.zeros(3, 7))
