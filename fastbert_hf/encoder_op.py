# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""The ops around an encoder's feed-forward blocks, for inference: their contracts, their registration with PyTorch.

`encoder_reference.py` says what they compute. Backends of `linear_int8` agree to the last bit; those of the others
differ in float rounding, which in `attention_int8` can move a quantised value by one step where it is close to
halfway. None of the ops has a gradient: forward runs where gradients are recorded, backward through it raises.
PyTorch knows them as `fastbert::linear_int8_v1`, `attention_v1`, `attention_int8_v1` and `add_norm_v1`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .backends_fastbert import PlainBackend, backend_for, register_backends
from .dispatch_fastbert import is_exporting, refuse_forward_mode, register_without_gradient, runs_directly
from .encoder_reference import (
    QuantizedAttentionCall,
    add_norm_forward,
    attention_forward,
    attention_int8_forward,
    check_attention_arguments,
    check_linear_arguments,
    check_norm_arguments,
    check_quantized_attention_arguments,
    linear_int8_forward,
    linear_int8_traceable,
)


class QuantizedLinearReferenceBackend(PlainBackend):
    """`encoder_reference.linear_int8_forward`."""

    infer = staticmethod(linear_int8_forward)


class AttentionReferenceBackend(PlainBackend):
    """`encoder_reference.attention_forward`."""

    infer = staticmethod(attention_forward)


class QuantizedAttentionReferenceBackend(PlainBackend):
    """`encoder_reference.attention_int8_forward`."""

    def infer(self, *arguments) -> Tensor:
        return attention_int8_forward(QuantizedAttentionCall(*arguments))


class AddNormReferenceBackend(PlainBackend):
    """`encoder_reference.add_norm_forward`."""

    infer = staticmethod(add_norm_forward)


ADD_NORM_BACKENDS = register_backends("add_norm", AddNormReferenceBackend())
QUANTIZED_LINEAR_BACKENDS = register_backends("linear_int8", QuantizedLinearReferenceBackend())
ATTENTION_BACKENDS = register_backends("attention", AttentionReferenceBackend())
QUANTIZED_ATTENTION_BACKENDS = register_backends("attention_int8", QuantizedAttentionReferenceBackend())


def _fake(query_key_value, visible, scaling):
    check_attention_arguments(query_key_value, visible)
    return query_key_value.new_empty(*query_key_value.shape[:2], query_key_value.shape[3:].numel())


def _quantized_fake(*arguments):
    check_quantized_attention_arguments(QuantizedAttentionCall(*arguments))
    return torch.empty_like(arguments[0], memory_format=torch.contiguous_format)


register_without_gradient(
    "attention_v1",
    "(Tensor query_key_value, Tensor? visible, float scaling) -> Tensor",
    lambda *call: backend_for("attention", *call).infer(*call),
    _fake,
)
register_without_gradient(
    "attention_int8_v1",
    "(Tensor x, Tensor? visible, Tensor weight_in, Tensor scale_in, Tensor sum_in, Tensor? bias_in, "
    "Tensor weight_out, Tensor scale_out, Tensor sum_out, Tensor? bias_out, int heads, float scaling) -> Tensor",
    lambda *call: backend_for("attention_int8", *call).infer(*call),
    _quantized_fake,
)


def _add_norm_fake(x, y, weight, bias, eps):
    check_norm_arguments(x, y, weight, bias)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_without_gradient(
    "add_norm_v1",
    "(Tensor x, Tensor y, Tensor weight, Tensor bias, float eps) -> Tensor",
    lambda *call: backend_for("add_norm", *call).infer(*call),
    _add_norm_fake,
)


def _run(op: str, traceable: Callable[..., Tensor], call: tuple, tensors: int) -> Tensor:
    """A call of an op, of whose arguments the first `tensors` are tensors or None; exporters see `traceable`."""
    if is_exporting():
        return traceable(*call)
    refuse_forward_mode(op)
    if runs_directly(*call[:tensors]):
        return backend_for(op, *call).infer(*call)
    return getattr(torch.ops.fastbert, f"{op}_v1")(*call)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """A residual connection and the layer norm behind it; see `encoder_reference.add_norm_forward`.

    Args:
        x: (..., H) float32. y: (..., H) float32, bfloat16 or float16. weight, bias: (H,) float32.
    Returns: (..., H) float32. Not differentiable.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a chosen backend that declines.
    """
    return _run("add_norm", add_norm_forward, (x, y, weight, bias, eps), 4)


def attention(query_key_value: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """Attention of every text and head; see `encoder_reference.attention_forward`.

    Args:
        query_key_value: (B, T, 3, heads, d) float32, bfloat16 or float16. visible: (B, T) booleans, or None for all.
        scaling: what scores are multiplied by.
    Returns: (B, T, heads * d) in the dtype of query_key_value. Not differentiable.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a chosen backend that declines.
    """
    return _run("attention", attention_forward, (query_key_value, visible, scaling), 2)


def _traceable_attention(*arguments) -> Tensor:
    return attention_int8_forward(QuantizedAttentionCall(*arguments), linear_int8_traceable)


def attention_int8(*arguments, **named) -> Tensor:
    """Attention between two linear layers with int8 weights; its arguments are those of `QuantizedAttentionCall`.

    Returns: (B, T, H) in the dtype of x. Not differentiable.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a chosen backend that declines.
    """
    call = QuantizedAttentionCall(*arguments, **named)
    return _run("attention_int8", _traceable_attention, call, len(call) - 2)


def _linear_fake(x, weight, scale, *rest):
    return x.new_empty(x.shape[0], check_linear_arguments(x, weight, scale, *rest))


register_without_gradient(
    "linear_int8_v1",
    "(Tensor x, Tensor weight, Tensor scale, Tensor sum, Tensor? bias) -> Tensor",
    lambda *call: backend_for("linear_int8", *call).infer(*call),
    _linear_fake,
)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, sum: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer with int8 weights; see `encoder_reference.linear_int8_forward`.

    Args:
        x: (N, K) float32, bfloat16 or float16. weight: (O * padded K) int8, packed.
        scale: (O,) float32. sum: (O,) int32. bias: (O,) float32 or None.
    Returns:
        y (N, O) in the dtype of x. Not differentiable.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a chosen backend that declines.
    """
    return _run("linear_int8", linear_int8_traceable, (x, weight, scale, sum, bias), 5)
