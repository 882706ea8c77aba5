"""LeafFeedForward: shapes, routes, counts, initialisation, errors."""

import pytest
import torch
from torch.nn.utils import parametrize, prune

from fastbert_hf import LeafFeedForward
from tests.oracle import dense_leaves


def test_any_leading_shape_and_route():
    layer = LeafFeedForward(8, 6, depth=3, leaf_width=5, trees=2, initializer_range=0.5)
    x = torch.randn(2, 3, 4, 8)
    y, (leaves, confidence) = layer(x), layer.route(x)
    expected, expected_leaves, _ = dense_leaves(x.reshape(-1, 8), *layer.op_arguments())
    assert y.shape == (2, 3, 4, 6) and leaves.shape == confidence.shape == (2, 3, 4, 2)
    assert leaves.dtype == torch.int64 and confidence.dtype == torch.float32
    torch.testing.assert_close(y.view(-1, 6), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(leaves.view(-1, 2), expected_leaves)
    assert (confidence >= 0.5).all() and (confidence <= 1).all()
    assert layer(x[0, 0, 0]).shape == (6,) and layer(torch.zeros(0, 8)).shape == (0, 6)
    assert layer(torch.zeros(2, 0, 8)).shape == (2, 0, 6)
    assert layer.route(x[0, 0, 0])[0].shape == (2,) and layer.route(torch.zeros(0, 8))[0].shape == (0, 2)


def test_without_a_decision_the_confidence_is_one():
    layer = LeafFeedForward(8, 6, depth=0, leaf_width=3)
    leaves, confidence = layer.route(torch.randn(4, 8))
    assert (leaves == 0).all() and (confidence == 1).all()


def test_neurons_are_counted():
    layer = LeafFeedForward(8, 8, depth=5, leaf_width=96, trees=2)
    assert (layer.neurons, layer.neurons_per_token) == (6144, 192)
    assert "neurons_per_token=192 of 6144" in repr(layer)


def test_initialisation_is_normal_with_zero_biases_and_sure_routers():
    layer = LeafFeedForward(64, 64, depth=7, leaf_width=4, initializer_range=0.5)
    assert abs(layer.weight_in.std().item() - 0.5) < 0.02 and abs(layer.weight_out.std().item() - 0.5) < 0.02
    logits = torch.randn(200, 64) @ layer.router.T
    assert abs(logits.std().item() - 4) < 0.2
    assert all((bias == 0).all() for bias in (layer.threshold, layer.bias_in, layer.bias_out))


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_of_each_leaf_are_counted_in_training_where_asked(compiled):
    layer = LeafFeedForward(8, 6, depth=2, leaf_width=3, trees=2)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(5, 7, 8)
    expected_y, expected = layer(x), torch.nn.functional.one_hot(layer.route(x)[0], 4).sum((0, 1))  # (P, m)
    layer.leaf_counts = torch.zeros(2, 4, dtype=torch.int64)
    for _ in range(2):
        y = run(x)
        torch.testing.assert_close(y, expected_y)
        y.sum().backward()
    assert torch.equal(layer.leaf_counts, 2 * expected)
    layer.eval()
    run(x)
    assert torch.equal(layer.leaf_counts, 2 * expected) and "leaf_counts" not in layer.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": -1}, "depth is -1; expected an integer of at least 0 and at most 12"),
        ({"depth": 13}, "depth is 13; expected an integer of at least 0 and at most 12"),
        ({"depth": "3"}, "depth is '3'; expected an integer"),
        ({"leaf_width": 0}, "leaf_width is 0; expected an integer of at least 1"),
        ({"leaf_width": -3}, "leaf_width is -3; expected an integer of at least 1"),
        ({"leaf_width": None}, "leaf_width is None; expected an integer of at least 1"),
        ({"leaf_width": 2.0}, r"leaf_width is 2\.0; expected an integer"),
        ({"trees": 0}, "trees is 0; expected an integer of at least 1"),
        ({"in_features": 0}, "in_features is 0"),
        ({"activation": "swish"}, "activation is 'swish'; expected one of gelu"),
    ],
)
def test_bad_sizes_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        LeafFeedForward(**({"in_features": 8, "out_features": 8, "depth": 2, "leaf_width": 4} | arguments))


def test_wrong_width_raises():
    with pytest.raises(ValueError, match=r"router has shape \(3, 8\); expected \(3, 7\)"):
        LeafFeedForward(8, 8, depth=2, leaf_width=4)(torch.zeros(3, 7))


@pytest.mark.parametrize("name", ["router", "weight_out", "bias_in"])
def test_a_parametrised_or_pruned_parameter_is_used(name):
    """PyTorch then holds the parameter under another name, and the layer has an attribute that computes it."""

    class Double(torch.nn.Module):
        def forward(self, value):
            return 2 * value

    x, (layer, wanted) = torch.randn(5, 8), (LeafFeedForward(8, 6, 2, 3) for _ in range(2))
    wanted.load_state_dict(layer.state_dict())
    with torch.no_grad():
        getattr(wanted, name).mul_(2)
    parametrize.register_parametrization(layer, name, Double())
    assert torch.equal(layer(x), wanted(x))
    parametrize.remove_parametrizations(layer, name)  # leaves the doubled values
    mask = torch.zeros_like(getattr(layer, name))
    prune.custom_from_mask(layer, name, mask)
    with torch.no_grad():
        getattr(wanted, name).zero_()
    assert torch.equal(layer(x), wanted(x))
