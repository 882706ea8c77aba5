"""Layers with int8 weights for the kernels, and how closely two correct backends agree on them."""

import torch
from torch import Tensor

from fastbert_hf import FastFeedForward, LeafFeedForward
from fastbert_hf.backends_fastbert import BACKENDS
from fastbert_hf.benchmarks.timing import one_thread
from fastbert_hf.quantized_layer import QuantizedFastFeedForward, QuantizedLeafFeedForward
from fastbert_hf.quantized_weights import quantize_rows, unpack
from tests.kernels.cases import TORCH_ACTIVATIONS, assert_close, largest, make_leaf_problem, make_problem

HALFWAY = 0.02  # of a step: how far float rounding can move a hidden value before it is rounded to int8
OPS = {QuantizedLeafFeedForward: "leaf_trees_int8", QuantizedFastFeedForward: "fff_int8"}


def backend_of(layer, name: str = "native"):
    return BACKENDS[OPS[type(layer)]][name]


def _filled(layer, problem):
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(getattr(problem, name))
    return layer


def quantized_leaves(*shape, **options) -> tuple[QuantizedLeafFeedForward, Tensor]:
    """A layer and rows away from ties; arguments as `make_leaf_problem`."""
    problem = make_leaf_problem(*shape, **options)
    width, trees, depth = problem.weight_in.shape[0] // problem.trees >> problem.depth, problem.trees, problem.depth
    layer = LeafFeedForward(
        problem.x.shape[1], problem.weight_out.shape[1], depth, width, trees, problem.activation,
        problem.bias_in is not None,
    )  # fmt: skip
    return QuantizedLeafFeedForward.from_float(_filled(layer, problem)), problem.x


def quantized_nodes(*shape, **options) -> tuple[QuantizedFastFeedForward, Tensor]:
    """The same for trees of single neurons; arguments as `make_problem`."""
    problem = make_problem(*shape, **options)
    layer = FastFeedForward(
        problem.x.shape[1], problem.weight_out.shape[1], problem.depth, problem.trees, problem.activation,
        problem.bias_in is not None,
    )  # fmt: skip
    return QuantizedFastFeedForward.from_float(_filled(layer, problem)), problem.x


def halfway_steps(layer: QuantizedLeafFeedForward, x: Tensor, leaves: Tensor) -> tuple[Tensor, float]:
    """What one step of every hidden value that is close to halfway between two adds to y, and the size of its terms.

    Args:
        x: (N, H) finite. leaves: (N, P), which x takes.
    Returns: (N, H_out) float64; the largest logit times the largest weight times sqrt(w), plus the largest bias.
    """
    q, scale, zero = (t.double() for t in quantize_rows(x.float() * layer.input_scale))
    weight_in = unpack(layer.weight_in, layer.leaf_width, layer.in_features).double()
    weight_out = unpack(layer.weight_out, layer.out_features, layer.leaf_width).double()
    steps, size = x.new_zeros(x.shape[0], layer.out_features, dtype=torch.float64), 0.0
    for tree in range(layer.trees):
        leaf = leaves[:, tree].long() + tree * 2**layer.depth
        dots = (weight_in[leaf] @ (q - zero).unsqueeze(-1)).squeeze(-1)  # (N, w)
        logits = dots * layer.scale_in.view(-1, layer.leaf_width)[leaf] * scale
        if layer.bias_in is not None:
            logits = logits + layer.bias_in.view(-1, layer.leaf_width)[leaf]
        hidden = TORCH_ACTIVATIONS[layer.activation](logits)
        low, high = hidden.amin(1, keepdim=True).clamp(max=0), hidden.amax(1, keepdim=True).clamp(min=0)
        step = ((high - low) / 255).clamp(min=1e-30)
        near = _near_half(hidden / step)
        last = (hidden / step).round() + (-low / step).round() >= 255  # cut to 255 or not
        near |= last & _near_half(-low / step)
        moved = (weight_out[leaf].abs() @ near.double().unsqueeze(-1)).squeeze(-1)  # (N, H_out)
        steps += moved * layer.scale_out[leaf] * step
        terms = largest(logits) * largest(layer.scale_out) * 127 * layer.leaf_width**0.5
        size = max(size, terms + (0 if layer.bias_out is None else largest(layer.bias_out)))
    return steps, size


def _near_half(values: Tensor) -> Tensor:
    return ((values - values.floor()) - 0.5).abs() < HALFWAY


def check(layer, x: Tensor, backend=None) -> None:
    """Output and routes against the reference."""
    backend = backend or backend_of(layer)
    y, *routes = backend.forward(x, *layer.op_arguments())
    with one_thread():
        expected, *expected_routes = backend_of(layer, "reference").forward(x.float(), *layer.op_arguments())
    assert y.dtype == x.dtype and torch.equal(backend.infer(x, *layer.op_arguments()), y)
    assert routes[0].dtype == torch.int32 and torch.equal(routes[0], expected_routes[0])
    if isinstance(layer, QuantizedFastFeedForward):
        logits = x.double() @ layer.weight_in.double().T
        return assert_close(y, expected.double(), "y", largest(logits, layer.dequantize().weight_out.detach()))
    torch.testing.assert_close(routes[1], expected_routes[1], rtol=1e-5, atol=2e-6)
    steps, size = halfway_steps(layer, x, routes[0])
    error = ((y.double() - expected.double()).abs() - steps).clamp(min=0)
    rtol = 4e-6 if y.dtype == torch.float32 else 2.0**-8  # one rounding
    assert (error <= rtol * expected.double().abs() + 4e-6 * size).all(), error.max()
