"""QuantizedLeafFeedForward and QuantizedFastFeedForward: from float layers, state, dtypes, errors."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbert_hf import FastFeedForward, LeafFeedForward
from fastbert_hf.quantized_layer import LEAST_COLUMN, QuantizedFastFeedForward, QuantizedLeafFeedForward, column_sizes

SIZES = {
    "leaves": (LeafFeedForward, QuantizedLeafFeedForward, (10, 6, 3, 7, 2)),
    "nodes": (FastFeedForward, QuantizedFastFeedForward, (10, 6, 3, 2)),
}


@pytest.fixture(params=SIZES)
def classes(request):
    return SIZES[request.param]


def made(classes, **options):
    floating, quantized, sizes = classes
    torch.manual_seed(0)
    layer = floating(*sizes, initializer_range=0.5, **options)
    return layer, quantized.from_float(layer)


def test_any_leading_shape_and_the_routes_of_the_float_layer(classes):
    layer, quantized = made(classes)
    x = torch.randn(2, 3, 4, 10)
    y = quantized(x)
    assert y.shape == (2, 3, 4, 6) and quantized(x[0, 0, 0]).shape == (6,)
    assert torch.equal(y.view(-1, 6), quantized(x.view(-1, 10)))
    assert quantized(torch.zeros(0, 10)).shape == (0, 6) and quantized(torch.zeros(2, 0, 10)).shape == (2, 0, 6)
    assert (y - layer(x)).norm() < 0.02 * layer(x).norm()
    for ours, theirs in zip(quantized.route(x), layer.route(x)):  # leaves and confidence, or rows of visited nodes
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert (quantized.neurons, quantized.neurons_per_token) == (layer.neurons, layer.neurons_per_token)
    assert f"neurons_per_token={layer.neurons_per_token} of {layer.neurons}" in repr(quantized)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_layers_of_every_dtype_are_quantised(classes, dtype):
    layer, _ = made(classes)
    expected = classes[1].from_float(layer.to(dtype).float()).state_dict()
    state = classes[1].from_float(layer.to(dtype)).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bias", [True, False])
def test_an_empty_layer_is_filled_by_a_saved_state(classes, bias, tmp_path):
    layer, quantized = made(classes, bias=bias)
    x, expected = torch.randn(4, 10), quantized(torch.randn(4, 10))
    expected = quantized(x)
    save_file(quantized.state_dict(), tmp_path / "layer.safetensors")
    empty = classes[1](*classes[2], bias=bias, initializer_range=0.1, dtype=torch.bfloat16)
    empty.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(empty(x), expected)
    with torch.device("meta"):
        hollow = classes[1](*classes[2], bias=bias)
    hollow.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert torch.equal(hollow(x), expected)
    for copied in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(copied(x), expected)
    assert not list(quantized.parameters()) and set(dict(layer.named_parameters())) <= set(quantized.state_dict())


def test_a_change_of_dtype_changes_rows_alone(classes):
    _, quantized = made(classes)
    before = {name: buffer.clone() for name, buffer in quantized.named_buffers()}
    x = torch.randn(4, 10)
    expected = quantized(x.bfloat16())
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()):
        model = change(torch.nn.Sequential(quantized))
        for name, buffer in quantized.named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
        assert torch.equal(model(x.bfloat16()), expected)
    assert all(buffer.is_meta for buffer in quantized.to("meta", torch.bfloat16).buffers())


def test_the_mode_and_the_device_are_those_of_the_float_layer(classes):
    layer, quantized = made(classes)
    assert quantized.training and not classes[1].from_float(layer.eval()).training


@torch.no_grad()
def test_dequantized_weights_are_off_by_half_a_step_at_most(classes):
    layer, quantized = made(classes)
    wide = quantized.dequantize()
    assert type(wide) is classes[0] and wide.training == quantized.training
    if classes[0] is LeafFeedForward:
        steps = {
            "weight_in": quantized.scale_in.unsqueeze(1) * quantized.input_scale,
            "weight_out": quantized.scale_out.repeat_interleave(layer.leaf_width, 0),
        }
    else:
        steps = {"weight_out": quantized.scale_out.unsqueeze(1) * quantized.output_scale}
    for (name, value), other in zip(wide.named_parameters(), layer.parameters()):
        if name in steps:
            assert ((value - other).abs() <= 0.501 * steps[name]).all(), name
            assert not torch.equal(value, other)
        else:
            assert torch.equal(value, other), name


@torch.no_grad()
def test_large_columns_of_x_cost_less_where_they_are_known():
    torch.manual_seed(0)
    layer, sizes = LeafFeedForward(64, 32, 2, 24, initializer_range=0.3), torch.ones(64)
    sizes[[3, 40]] = 30
    layer.weight_in /= sizes  # as trained layers have it: no column outweighs all others
    x = torch.randn(200, 64) * sizes
    expected, errors = layer(x), {}
    for name, quantized in (
        ("columns alike", QuantizedLeafFeedForward.from_float(layer, input_range=column_sizes(layer.weight_in))),
        ("default", QuantizedLeafFeedForward.from_float(layer)),
        ("known", QuantizedLeafFeedForward.from_float(layer, input_range=x.abs().amax(0))),
    ):
        errors[name] = (quantized(x) - expected).norm() / expected.norm()
    assert errors["known"] < 0.5 * errors["columns alike"] and errors["default"] < 0.5 * errors["columns alike"]


@torch.no_grad()
def test_columns_without_weights_or_without_values_do_no_harm():
    layer = LeafFeedForward(8, 8, 1, 4, initializer_range=0.5)
    layer.weight_in[:, 2] = 0
    x = torch.randn(20, 8)
    x[:, :2] = 0
    for input_range in (None, x.abs().amax(0), torch.zeros(8)):
        quantized = QuantizedLeafFeedForward.from_float(layer, input_range=input_range)
        assert (quantized.input_scale > 0).all() and quantized.input_scale.isfinite().all()
        assert (quantized(x) - layer(x)).norm() < 0.03 * layer(x).norm()
    layer.weight_in.zero_()
    torch.testing.assert_close(QuantizedLeafFeedForward.from_float(layer)(x), layer(x), rtol=0.02, atol=1e-3)
    assert column_sizes(torch.tensor([[1.0, 1e-9, 0.0]])).tolist() == [1, LEAST_COLUMN, LEAST_COLUMN]


def test_weights_that_are_not_finite_raise(classes):
    layer, _ = made(classes)
    with torch.no_grad():
        layer.weight_out[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        classes[1].from_float(layer)
    leaves, _ = made(SIZES["leaves"])
    with torch.no_grad():
        leaves.weight_in[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or Inf"):
        QuantizedLeafFeedForward.from_float(leaves)


@pytest.mark.parametrize("bad", [torch.ones(9), torch.tensor([-1.0] * 10), torch.tensor([float("nan")] * 10)])
def test_a_wrong_input_range_raises(bad):
    with pytest.raises(ValueError, match=r"input_range .*expected \(10,\)"):
        QuantizedLeafFeedForward.from_float(LeafFeedForward(10, 6, 3, 7), input_range=bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"depth": 13}, "depth is 13"), ({"leaf_width": 0}, "leaf_width is 0"), ({"activation": "swish"}, "'swish'")],
)
def test_bad_sizes_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLeafFeedForward(**({"in_features": 8, "out_features": 8, "depth": 2, "leaf_width": 4} | arguments))
