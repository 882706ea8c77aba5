"""`QuantizedLinear`: what it computes, by its kernel and by plain operations."""

import copy

import pytest
import torch
from torch import nn

from fastbert_hf import use_backend
from fastbert_hf.quantized_linear import QuantizedLinear

SHAPES = [(16, 8), (7, 13), (1, 1), (384, 96)]


def layers(in_features: int, out_features: int, bias: bool = True) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(in_features)
    linear = nn.Linear(in_features, out_features, bias=bias)
    return linear, QuantizedLinear.from_float(linear)


def steps(x: torch.Tensor) -> torch.Tensor:
    """Of each row's rounding: (..., 1)."""
    return (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / 255


def exact(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition in float64, in which all sums of integers are exact."""
    rows, scale = x.double(), steps(x.double()).clamp(min=1e-30)
    zero = (-rows.amin(-1, keepdim=True).clamp(max=0) / scale).round()
    q = ((rows / scale).round() + zero).clamp(0, 255)
    y = (q - zero) @ layer.weight.double().T * scale * layer.weight_scale
    return y if layer.bias is None else y + layer.bias


def one_step(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """How far an output moves where every value of its row is rounded the other way: the bound, by output."""
    return steps(x) * layer.weight.abs().float().sum(1) * layer.weight_scale


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_it_computes_its_definition(shape, bias, backend):
    _, layer = layers(*shape, bias)
    for size in ((5,), (2, 3), (1,)):
        x = torch.randn(*size, shape[0]) * torch.linspace(0.1, 9, size[0]).view(-1, *[1] * len(size))
        with use_backend(backend):
            y = layer(x)
        assert y.shape == (*size, shape[1]) and y.dtype == torch.float32
        distance = (y - exact(layer, x)).abs()
        assert (distance <= 0.02 * one_step(layer, x) + 1e-6).float().mean() > 0.9  # some value may be next to a half
        assert (distance <= one_step(layer, x) + 1e-6).all()


@torch.no_grad()
def test_a_row_does_not_depend_on_those_beside_it():
    _, layer = layers(16, 8)
    x = torch.randn(3, 16)
    beside = torch.cat([x[:1], 1000 * x[1:]])
    assert torch.equal(layer(beside)[0], layer(x)[0])


@torch.no_grad()
def test_weights_are_rounded_by_half_a_step_at_most():
    linear, layer = layers(64, 32)
    restored = layer.weight.float() * layer.weight_scale.unsqueeze(1)
    assert ((restored - linear.weight).abs() <= layer.weight_scale.unsqueeze(1) / 2 * 1.0001).all()
    assert torch.equal(layer.weight_sum, layer.weight.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_inputs_of_one_sign_zeros_and_no_rows(backend):
    _, layer = layers(16, 8)
    with use_backend(backend):
        for x in (torch.rand(3, 16) + 5, -torch.rand(3, 16) - 5):
            assert ((layer(x) - exact(layer, x)).abs() <= one_step(layer, x) + 1e-5).all()
        torch.testing.assert_close(layer(torch.zeros(3, 16)), layer.bias.expand(3, 8))
        assert layer(torch.zeros(0, 16)).shape == (0, 8)


@torch.no_grad()
def test_the_sums_do_not_saturate():
    """The largest weights and inputs: pairs of products would overflow 16 bits."""
    linear = nn.Linear(256, 4, bias=False)
    linear.weight.fill_(1.0)
    x = torch.ones(2, 256)
    torch.testing.assert_close(QuantizedLinear.from_float(linear)(x), linear(x), rtol=1e-5, atol=0)


@torch.no_grad()
def test_rows_of_zeros_and_half_precision_inputs():
    linear, _ = layers(16, 8)
    linear.weight[3] = 0
    layer = QuantizedLinear.from_float(linear)
    x = torch.randn(4, 16)
    torch.testing.assert_close(layer(x)[:, 3], linear.bias[3].expand(4))
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x.bfloat16().float()), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_joined_layers_give_their_outputs_side_by_side():
    parts = [layers(16, size)[1] for size in (4, 6, 5)]
    x = torch.randn(3, 16)
    expected = torch.cat([part(x) for part in parts], dim=-1)
    torch.testing.assert_close(QuantizedLinear.joined(*parts)(x), expected)


@torch.no_grad()
def test_copies_and_casts_keep_the_numbers():
    _, layer = layers(16, 8)
    x = torch.randn(3, 16)
    expected = layer(x)  # packed by now
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(cast(x), expected) and cast.weight.dtype == torch.int8
    again = QuantizedLinear(16, 8)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), expected)


@torch.no_grad()
def test_weights_that_are_loaded_later_count():
    """A layer that has computed already has packed its weights."""
    _, first = layers(16, 8)
    _, second = layers(16, 8)
    second.weight.add_(1)
    x = torch.randn(3, 16)
    first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


def test_an_input_with_a_gradient_and_weights_that_are_not_finite_are_errors():
    linear, layer = layers(16, 8)
    with pytest.raises(NotImplementedError, match="no gradient"):
        layer(torch.randn(2, 16, requires_grad=True)).sum().backward()
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        QuantizedLinear.from_float(linear)


@torch.no_grad()
def test_a_compiled_layer_gives_the_same_numbers():
    torch._dynamo.reset()
    _, layer = layers(32, 16)
    x = torch.randn(6, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
