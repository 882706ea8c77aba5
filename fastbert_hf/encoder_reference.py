# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""What surrounds the feed-forward blocks of an encoder, for inference, in plain PyTorch: the definition that every
backend is tested against.

    linear_int8     a linear layer with int8 weights, quantised as quantized_reference.py says
    add_norm        norm(x + y): a residual connection and the layer norm behind it
    attention       softmax(scaling * Q K^T) V for every text and head, from queries, keys and values side by side, as
                    one linear layer makes them
    attention_int8  the same between two linear layers with int8 weights

B texts, T tokens, H = heads * d. Keys that are not visible are left out; a query that sees none sees all. A backend
may compute products and sums in float32 where x is narrower. Source: arXiv 1706.03762 and 1607.06450.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .quantized_reference import INPUT_DTYPES, MAX_INT8_WIDTH, check_rows, check_tensors
from .quantized_weights import padded_columns, quantize_rows, unpack


def check_linear_arguments(x: Tensor, weight: Tensor, scale: Tensor, sum: Tensor, bias: Tensor | None) -> int:
    """Check the arguments of the op; every backend does so before it computes.

    Returns: the number of outputs O.
    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    if (  # all is well: the rest only finds the words
        x.dim() == 2
        and x.dtype in INPUT_DTYPES
        and 0 < (width := x.shape[1]) <= MAX_INT8_WIDTH
        and scale.dim() == 1
        and (outputs := scale.shape[0]) > 0
        and weight.shape == (outputs * padded_columns(width),)
        and sum.shape == scale.shape
        and (bias is None or bias.shape == scale.shape)
        and weight.dtype == torch.int8
        and sum.dtype == torch.int32
        and all(t is None or t.dtype == torch.float32 for t in (scale, bias))
        and all(t is None or t.device == x.device for t in (weight, scale, sum, bias))
    ):
        return outputs
    check_rows(x)
    if not 0 < x.shape[1] <= MAX_INT8_WIDTH or scale.dim() != 1 or not len(scale):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and scale {tuple(scale.shape)}; expected rows of 1 to {MAX_INT8_WIDTH} "
            "values, as sums are int32, and a scale for each output"
        )
    check_tensors(
        x.device,
        weight=(weight, torch.int8, (len(scale) * padded_columns(x.shape[1]),)),
        scale=(scale, torch.float32, (len(scale),)),
        sum=(sum, torch.int32, (len(scale),)),
        bias=(bias, torch.float32, (len(scale),)),
    )
    raise AssertionError("the arguments are well after all")


def linear_int8_forward(x: Tensor, weight: Tensor, scale: Tensor, sum: Tensor, bias: Tensor | None) -> Tensor:
    """y = row_scale * (q - zero) W_q^T * scale + bias.

    Args:
        x: (N, K) float32, bfloat16 or float16. weight: (O * padded K) int8, the rows of W_q packed.
        scale: (O,) float32. sum: (O,) int32, the sums of the rows of W_q. bias: (O,) float32 or None.
    Returns:
        y (N, O) in the dtype of x.
    Raises:
        ValueError: as `check_linear_arguments`.
    """

    def products(q, zero, matrix):
        if not q.is_cpu:
            return (q - zero).double() @ matrix.t().double()
        return torch._int_mm((q - 128).to(torch.int8), matrix.t()) - (zero - 128).int() * sum

    return _linear_outputs(x, weight, scale, sum, bias, products)


def linear_int8_traceable(x: Tensor, weight: Tensor, scale: Tensor, sum: Tensor, bias: Tensor | None) -> Tensor:
    """The same from ATen operations every exporter knows."""
    return _linear_outputs(
        x, weight, scale, sum, bias, lambda q, zero, matrix: (q - zero).double() @ matrix.t().double()
    )


def _linear_outputs(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    sum: Tensor,
    bias: Tensor | None,
    products: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Args: products: (q (N, K), zero (N, 1), W_q (O, K)) -> (q - zero) W_q^T, exact."""
    outputs = check_linear_arguments(x, weight, scale, sum, bias)
    q, row_scale, zero = quantize_rows(x.float())
    y = products(q, zero, unpack(weight, outputs, x.shape[1])).float() * scale * row_scale
    return (y if bias is None else y + bias).to(x.dtype)


def check_visible(x: Tensor, visible: Tensor | None) -> None:
    """Raises ValueError where `visible` is not (B, T) booleans beside x (B, T, ...)."""
    if visible is None:
        return
    if visible.shape != x.shape[:2] or visible.dtype != torch.bool or visible.device != x.device:
        raise ValueError(
            f"visible is {tuple(visible.shape)} {visible.dtype} on {visible.device}; expected "
            f"{tuple(x.shape[:2])} torch.bool on {x.device}, where x is"
        )


def check_attention_arguments(query_key_value: Tensor, visible: Tensor | None) -> None:
    """Check the arguments of `attention`; every backend does so before it computes.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    if query_key_value.dim() != 5 or query_key_value.shape[2] != 3 or 0 in query_key_value.shape[3:]:
        raise ValueError(f"query_key_value has shape {tuple(query_key_value.shape)}; expected (B, T, 3, heads, d)")
    if query_key_value.dtype not in INPUT_DTYPES:
        expected = ", ".join(map(str, INPUT_DTYPES))
        raise ValueError(f"query_key_value is {query_key_value.dtype}; expected one of {expected}")
    check_visible(query_key_value, visible)


def attention_forward(query_key_value: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """Attention of every text and head.

    Args:
        query_key_value: (B, T, 3, heads, d) float32, bfloat16 or float16. visible: (B, T) booleans, or None for all.
        scaling: what scores are multiplied by, as a rule d^-0.5.
    Returns: (B, T, H) in the dtype of query_key_value.
    Raises:
        ValueError: as `check_attention_arguments`.
    """
    check_attention_arguments(query_key_value, visible)
    query, key, value = query_key_value.permute(2, 0, 3, 1, 4).unbind()  # three of (B, heads, T, d)
    mask = None if visible is None else (visible | ~visible.any(1, keepdim=True))[:, None, None]
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return mixed.transpose(1, 2).flatten(2)  # (B, heads, T, d) -> (B, T, H)


class QuantizedAttentionCall(NamedTuple):
    """The arguments of `attention_int8`.

    Attributes:
        x: (B, T, H) float32, bfloat16 or float16. visible: (B, T) booleans, or None for all.
        weight_in: (3 H * padded H) int8, that of query, key and value packed; scale_in (3 H,) float32, sum_in (3 H,)
            int32, bias_in (3 H,) float32 or None.
        weight_out: (H * padded H) int8, scale_out, sum_out and bias_out (H,): the same for the layer behind.
        heads: of width H / heads. scaling: what scores are multiplied by.
    """

    x: Tensor
    visible: Tensor | None
    weight_in: Tensor
    scale_in: Tensor
    sum_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    scale_out: Tensor
    sum_out: Tensor
    bias_out: Tensor | None
    heads: int
    scaling: float


def check_quantized_attention_arguments(call: QuantizedAttentionCall) -> None:
    """Check the arguments of `attention_int8`; every backend does so before it computes.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    x, width = call.x, call.x.shape[-1] if call.x.dim() else 0
    if x.dim() != 3 or call.heads < 1 or width % call.heads:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and there are {call.heads} heads; expected (B, T, H) with H a multiple of "
            "the heads"
        )
    check_visible(x, call.visible)
    rows = x.flatten(0, 1)
    if check_linear_arguments(rows, *call[2:6]) != 3 * width or check_linear_arguments(rows, *call[6:10]) != width:
        raise ValueError(
            f"scale_in and scale_out have {len(call.scale_in)} and {len(call.scale_out)} outputs; expected "
            f"{3 * width} and {width}, as x is {width} wide"
        )


def attention_int8_forward(
    call: QuantizedAttentionCall, linear: Callable[..., Tensor] = linear_int8_forward
) -> Tensor:
    """Query, key and value from x, attention, and the linear layer behind it; what lies between has the dtype of x.

    Args: linear: `linear_int8_forward` or, for exporters, `linear_int8_traceable`.
    Returns: (B, T, H) in the dtype of x.
    Raises:
        ValueError: as `check_quantized_attention_arguments`.
    """
    check_quantized_attention_arguments(call)
    texts, tokens, width = call.x.shape
    joined = linear(call.x.flatten(0, 1), *call[2:6]).view(texts, tokens, 3, call.heads, width // call.heads)
    mixed = attention_forward(joined, call.visible, call.scaling)
    return linear(mixed.flatten(0, 1), *call[6:10]).view(texts, tokens, width)


def check_norm_arguments(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check the arguments of `add_norm`; every backend does so before it computes.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    width = x.shape[-1:]
    if (  # all is well: the rest only finds the words
        x.dtype == weight.dtype == bias.dtype == torch.float32
        and y.dtype in INPUT_DTYPES
        and y.shape == x.shape
        and x.dim()
        and width[0]
        and weight.shape == bias.shape == width
        and x.device == y.device == weight.device == bias.device
    ):
        return
    if x.dtype != torch.float32 or not x.dim() or 0 in width:
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; expected (..., H) torch.float32")
    if y.shape != x.shape or y.dtype not in INPUT_DTYPES or y.device != x.device:
        raise ValueError(f"y is {tuple(y.shape)} {y.dtype} on {y.device}; expected {tuple(x.shape)} on {x.device}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != width or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; expected {tuple(width)} "
                f"torch.float32 on {x.device}"
            )


def add_norm_forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(s - mean(s)) / sqrt(var(s) + eps) * weight + bias for every row s of x + y.

    Args:
        x: (..., H) float32. y: (..., H) float32, bfloat16 or float16. weight, bias: (H,) float32.
    Returns: (..., H) float32.
    Raises:
        ValueError: as `check_norm_arguments`.
    """
    check_norm_arguments(x, y, weight, bias)
    return torch.nn.functional.layer_norm(x + y, weight.shape, weight, bias, eps)
