# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""The ops of trees with int8 weights, for inference: their contracts and their registration with PyTorch.

`leaf_trees_int8` is `leaf_trees` with the products of its leaves in int8, and `fff_int8` is `fff` with `weight_out`
in int8. Both take the paths that the ops of float32 take on the same x. `quantized_reference.py` says exactly what is
rounded where. A backend computes the same sums of integers; two backends differ in float rounding alone: in that of
the logits and of the activation, which can move a quantised value by one step where it is close to halfway.

Neither op has a gradient: forward runs where gradients are recorded, backward through it raises. PyTorch knows them
as `fastbert::leaf_trees_int8_v1` and `fastbert::fff_int8_v1`. Source: leaf_op.py and fff_op.py; the quantisation is
ours, with columns balanced between x and weights as in arXiv 2211.10438.
"""

import torch
from torch import Tensor

from .backends_fastbert import PlainBackend, backend_for, register_backends
from .dispatch_fastbert import is_exporting, refuse_forward_mode, register_without_gradient, runs_directly
from .quantized_reference import (
    QuantizedLeafCall,
    check_quantized_arguments,
    check_quantized_leaf_arguments,
    fff_int8_forward,
    fff_int8_traceable,
    leaf_trees_int8_forward,
    leaf_trees_int8_traceable,
)


class QuantizedLeafReferenceBackend(PlainBackend):
    """`quantized_reference.leaf_trees_int8_forward`."""

    def forward(self, *arguments) -> tuple[Tensor, Tensor, Tensor]:
        return leaf_trees_int8_forward(QuantizedLeafCall(*arguments))


class QuantizedReferenceBackend(PlainBackend):
    """`quantized_reference.fff_int8_forward`."""

    forward = staticmethod(fff_int8_forward)


QUANTIZED_LEAF_BACKENDS = register_backends("leaf_trees_int8", QuantizedLeafReferenceBackend())
QUANTIZED_BACKENDS = register_backends("fff_int8", QuantizedReferenceBackend())


def _leaf_backend(call: QuantizedLeafCall):
    return backend_for("leaf_trees_int8", call.x, call.weight_in, call.weight_out, *call[-3:])


def _leaf_fake(*arguments):
    call = QuantizedLeafCall(*arguments)
    check_quantized_leaf_arguments(call)
    x, routes = call.x, (call.x.shape[0], call.trees)
    return (
        x.new_empty(x.shape[0], call.scale_out.shape[1]),
        x.new_empty(routes, dtype=torch.int32),
        x.new_empty(routes, dtype=torch.float32),
    )


register_without_gradient(
    "leaf_trees_int8_v1",
    "(Tensor x, Tensor router, Tensor threshold, Tensor input_scale, Tensor weight_in, Tensor scale_in, "
    "Tensor sum_in, Tensor? bias_in, Tensor weight_out, Tensor scale_out, Tensor sum_out, Tensor? bias_out, "
    "SymInt trees, SymInt depth, str activation) -> (Tensor, Tensor, Tensor)",
    lambda *arguments: _leaf_backend(QuantizedLeafCall(*arguments)).forward(*arguments),
    _leaf_fake,
)


def leaf_trees_int8(*arguments, **named) -> Tensor:
    """Leaf trees with int8 weights; its arguments are those of `quantized_reference.QuantizedLeafCall`.

    Returns:
        y (N, H_out) in the dtype of x. Not differentiable.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, or a chosen backend that
            declines.
    """
    call = QuantizedLeafCall(*arguments, **named)
    if is_exporting():
        check_quantized_leaf_arguments(call)
        return leaf_trees_int8_traceable(call)
    refuse_forward_mode("leaf_trees_int8")
    if runs_directly(*call[:-3]):
        return _leaf_backend(call).infer(*call)
    return torch.ops.fastbert.leaf_trees_int8_v1(*call)[0]


def _fff_backend(arguments: tuple):
    x, weight_in, weight_out = arguments[0], arguments[1], arguments[3]
    return backend_for("fff_int8", x, weight_in, weight_out, *arguments[-3:])


def _fff_fake(x, *arguments):
    check_quantized_arguments(x, *arguments)
    num_rows, trees, levels = x.shape[0], arguments[-3], arguments[-2] + 1
    return x.new_empty(num_rows, arguments[2].shape[1]), x.new_empty(num_rows, trees, levels, dtype=torch.int32)


register_without_gradient(
    "fff_int8_v1",
    "(Tensor x, Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor scale_out, Tensor output_scale, "
    "SymInt trees, SymInt depth, str activation) -> (Tensor, Tensor)",
    lambda *arguments: _fff_backend(arguments).forward(*arguments),
    _fff_fake,
)


def fff_int8(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    scale_out: Tensor,
    output_scale: Tensor,
    trees: int,
    depth: int,
    activation: str = "gelu",
) -> Tensor:
    """Trees of single neurons with int8 output weights; see `quantized_reference.fff_int8_forward`.

    Args:
        x: (N, H) float32, bfloat16 or float16. The parameters are float32, weight_out (P*n, H_out) is int8.
        trees, depth: P >= 1 and D >= 0. activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
    Returns:
        y (N, H_out) in the dtype of x, accumulated in float32. Not differentiable.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, or a chosen backend that
            declines.
    """
    parameters = (weight_in, bias_in, weight_out, scale_out, output_scale)
    if is_exporting():
        check_quantized_arguments(x, *parameters, trees, depth, activation)
        return fff_int8_traceable(x, *parameters, trees, depth, activation)
    refuse_forward_mode("fff_int8")
    if runs_directly(x, *parameters):
        backend = backend_for("fff_int8", x, weight_in, weight_out, trees, depth, activation)
        return backend.infer(x, *parameters, trees, depth, activation)
    return torch.ops.fastbert.fff_int8_v1(x, *parameters, trees, depth, activation)[0]
