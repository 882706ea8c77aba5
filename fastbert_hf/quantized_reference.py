# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Trees with int8 weights, for inference, in plain PyTorch: the definition that every backend is tested against.

Notation as in leaf_reference.py and fff_reference.py. Two things are quantised, by functions of quantized_weights.py:

- Weights, once: int8 between -127 and 127 with one float32 scale for each row of a matrix, so that the row is
  scale * q. A leaf's W_in (w, H) has a scale for each neuron, its W_out, seen as (H_out, w), one for each output.
- Rows of activations, when they arrive: uint8 with one scale and one zero point for each row. For leaves
  columns of x are multiplied by `input_scale` before that, and those of W_in divided by it when they are quantised,
  so that a few large columns of x do not decide the scale of all.

Routers, thresholds, decisions, the confidence, biases and activation functions are float32, whatever x is.
Sums of products are exact integers below 2^31; what is between them is float32, rounded after each operation.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .fff_reference import ACTIVATIONS, gathered_sum, parameter_rows, step_down, walk
from .leaf_reference import RowsByLeaf, confidence_of, find_routes, leaves_per_tree
from .leaf_traceable import TilesByLeaf, traceable_route
from .quantized_weights import padded_columns, quantize_rows, unpack

MAX_INT8_WIDTH = (2**31 - 1) // (255 * 127)  # of rows whose products are summed in int32: 66311
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- leaf trees ----


class QuantizedLeafCall(NamedTuple):
    """The arguments of `leaf_trees_int8`. P trees of depth D have r = 2^D - 1 routers and m = 2^D leaves each.

    Attributes:
        x: (N, H) float32, bfloat16 or float16. router (P*r, H), threshold (P*r,), input_scale (H,): float32.
        weight_in: (P*m, w * padded H) int8, each leaf's (w, H) packed; scale_in (P*m*w,) float32.
        weight_out: (P*m, H_out * padded w) int8, each leaf's (H_out, w) packed; scale_out (P*m, H_out) float32.
        sum_in (P*m*w,) and sum_out (P*m, H_out): int32, the sums of the rows of q, for backends that sum
            q * q' - zero * q' in two parts.
        bias_in (P*m*w,), bias_out (P*m, H_out): float32 or None.
        trees, depth: P >= 1 and D >= 0. activation: a key of `ACTIVATIONS`.
    """

    x: Tensor
    router: Tensor
    threshold: Tensor
    input_scale: Tensor
    weight_in: Tensor
    scale_in: Tensor
    sum_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    scale_out: Tensor
    sum_out: Tensor
    bias_out: Tensor | None
    trees: int
    depth: int
    activation: str = "gelu"


def check_quantized_leaf_arguments(call: QuantizedLeafCall) -> int:
    """Check the arguments of the op; every backend does so before it computes.

    Returns: the leaf width w.
    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    (
        x, router, threshold, input_scale, weight_in, scale_in, sum_in, bias_in,
        weight_out, scale_out, sum_out, bias_out, trees, depth, activation,
    ) = call  # fmt: skip
    floats = (router, threshold, input_scale, scale_in, bias_in, scale_out, bias_out)
    if (  # all is well: the rest only finds the words, which would take longer than a kernel at N = 1
        activation in ACTIVATIONS
        and trees >= 1
        and depth >= 0
        and x.dim() == 2
        and x.dtype in INPUT_DTYPES
        and 0 < (width := x.shape[1]) <= MAX_INT8_WIDTH
        and scale_in.dim() == 1
        and (neurons := scale_in.shape[0]) > 0
        and neurons % (leaves := trees << depth) == 0
        and (leaf_width := neurons // leaves) <= MAX_INT8_WIDTH
        and scale_out.dim() == 2
        and (out_width := scale_out.shape[1]) > 0
        and scale_out.shape[0] == leaves
        and router.shape == (leaves - trees, width)
        and threshold.shape == (leaves - trees,)
        and input_scale.shape == (width,)
        and weight_in.shape == (leaves, leaf_width * padded_columns(width))
        and weight_out.shape == (leaves, out_width * padded_columns(leaf_width))
        and sum_in.shape == (neurons,)
        and sum_out.shape == (leaves, out_width)
        and (bias_in is None or bias_in.shape == (neurons,))
        and (bias_out is None or bias_out.shape == (leaves, out_width))
        and weight_in.dtype == weight_out.dtype == torch.int8
        and sum_in.dtype == sum_out.dtype == torch.int32
        and all(t is None or t.dtype == torch.float32 for t in floats)
        and all(t is None or t.device == x.device for t in (*floats, weight_in, sum_in, weight_out, sum_out))
    ):
        return leaf_width
    return _explain_leaf_arguments(call)


def _explain_leaf_arguments(call: QuantizedLeafCall) -> int:
    """The checks of `check_quantized_leaf_arguments`, one by one, for their messages."""
    (
        x, router, threshold, input_scale, weight_in, scale_in, sum_in, bias_in,
        weight_out, scale_out, sum_out, bias_out, trees, depth, activation,
    ) = call  # fmt: skip
    _check_call(x, trees, depth, activation)
    leaves, width = trees * leaves_per_tree(depth), x.shape[1]
    neurons = scale_in.numel()
    if scale_in.dim() != 1 or neurons == 0 or neurons % leaves:
        raise ValueError(
            f"scale_in has shape {tuple(scale_in.shape)}; expected one scale for each neuron, a positive multiple of "
            f"{leaves}, the leaves of {trees} trees of depth {depth}"
        )
    leaf_width, out_width = neurons // leaves, scale_out.shape[-1] if scale_out.dim() else 0
    for name, value in (("x", width), ("a leaf", leaf_width), ("y", out_width)):
        if value == 0 or (value > MAX_INT8_WIDTH and name != "y"):
            raise ValueError(f"{name} is {value} wide; expected 1 to {MAX_INT8_WIDTH}, as sums are int32")
    check_tensors(
        x.device,
        router=(router, torch.float32, (leaves - trees, width)),
        threshold=(threshold, torch.float32, (leaves - trees,)),
        input_scale=(input_scale, torch.float32, (width,)),
        weight_in=(weight_in, torch.int8, (leaves, leaf_width * padded_columns(width))),
        scale_in=(scale_in, torch.float32, (neurons,)),
        sum_in=(sum_in, torch.int32, (neurons,)),
        bias_in=(bias_in, torch.float32, (neurons,)),
        weight_out=(weight_out, torch.int8, (leaves, out_width * padded_columns(leaf_width))),
        scale_out=(scale_out, torch.float32, (leaves, out_width)),
        sum_out=(sum_out, torch.int32, (leaves, out_width)),
        bias_out=(bias_out, torch.float32, (leaves, out_width)),
    )
    return leaf_width


def _check_call(x: Tensor, trees: int, depth: int, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if trees < 1 or depth < 0:
        raise ValueError(f"trees is {trees} and depth is {depth}; expected trees >= 1 and depth >= 0")
    check_rows(x)


def check_rows(x: Tensor) -> None:
    """Raises ValueError where x is not (N, H) of a dtype that is taken."""
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, H)")
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x is {x.dtype}; expected one of {', '.join(str(dtype) for dtype in INPUT_DTYPES)}")


def check_tensors(device: torch.device, **expected: tuple[Tensor | None, torch.dtype, tuple[int, ...]]) -> None:
    """Raises ValueError where a tensor has another dtype, shape or device. What is named bias may be None."""
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None and name.startswith("bias"):
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected {dtype} on {device}, where x is")


def _leaf_outputs(
    q: Tensor,
    scale: Tensor,
    leaf: Tensor,
    parameters: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    activation: str,
    products: Callable[[Tensor, Tensor], Tensor],
    weight_in: Tensor,
    weight_out: Tensor,
) -> Tensor:
    """What leaves say to quantised rows, before the confidence: q (N, H) without its zero point -> (N, H_out).

    Args:
        scale: (N, 1). leaf: (N,), the leaf of each row. parameters: scale_in (P*m, w), bias_in, scale_out, bias_out.
        products: of rows in float64, exact, with the weights of each row's leaf in `weight_in` or `weight_out`.
    """
    scale_in, bias_in, scale_out, bias_out = parameters
    logits = products(q.double(), weight_in).float() * scale_in[leaf] * scale
    if bias_in is not None:
        logits = logits + bias_in.view_as(scale_in)[leaf]
    hidden, hidden_scale, hidden_zero = quantize_rows(ACTIVATIONS[activation](logits))
    out = products((hidden - hidden_zero).double(), weight_out).float() * scale_out[leaf] * hidden_scale
    return out if bias_out is None else out + bias_out[leaf]


def leaf_trees_int8_forward(call: QuantizedLeafCall) -> tuple[Tensor, Tensor, Tensor]:
    """Route every row to one leaf of every tree and sum what the leaves say, scaled by the confidence.

    Returns:
        y (N, H_out) in the dtype of x; leaves (N, P) int32 and margins (N, P) float32 as `find_routes`.
    Raises:
        ValueError: as `check_quantized_leaf_arguments`.
    """
    width = check_quantized_leaf_arguments(call)
    x, router, threshold, input_scale, weight_in, scale_in, _, bias_in, weight_out, scale_out, _, bias_out = call[:-3]
    trees, depth, activation = call[-3:]
    num_leaves, out_width = leaves_per_tree(depth), scale_out.shape[1]
    leaves, _, margins = find_routes(x.float(), router, threshold, trees, depth)
    weight_in = unpack(weight_in, width, x.shape[1]).mT.unflatten(0, (trees, num_leaves))  # (P, m, H, w)
    weight_out = unpack(weight_out, out_width, width).mT.unflatten(0, (trees, num_leaves))  # (P, m, w, H_out)
    q, scale, zero = quantize_rows(x.float() * input_scale)
    confidence = confidence_of(margins)
    y = x.new_zeros(x.shape[0], out_width, dtype=torch.float32)
    for tree in range(trees):
        rows = RowsByLeaf(leaves[:, tree], num_leaves)
        leaf = rows.leaf + tree * num_leaves
        out = _leaf_outputs(
            (q - zero)[rows.order], scale[rows.order], leaf, (scale_in.view(-1, width), bias_in, scale_out, bias_out),
            activation, rows.products, weight_in[tree], weight_out[tree],
        )  # fmt: skip
        y[rows.order] += confidence[rows.order, tree].unsqueeze(1) * out
    return y.to(x.dtype), leaves, margins


def leaf_trees_int8_traceable(call: QuantizedLeafCall) -> Tensor:
    """The same from ATen operations every exporter knows: -> y (N, H_out)."""
    x, router, threshold, input_scale, weight_in, scale_in, _, bias_in, weight_out, scale_out, _, bias_out = call[:-3]
    trees, depth, activation = call[-3:]
    width, out_width, num_leaves = scale_in.shape[0] // weight_in.shape[0], scale_out.shape[1], leaves_per_tree(depth)
    q, scale, zero = quantize_rows(x.float() * input_scale)
    y = torch.zeros(x.shape[0], out_width, dtype=torch.float32, device=x.device)
    for tree in range(trees):
        leaf, c = traceable_route(x.float(), router, threshold, tree, depth)
        tiles = TilesByLeaf(leaf, tree, num_leaves)
        tile_in = unpack(weight_in[tiles.leaf], width, x.shape[1]).mT.double()  # (T, H, w)
        tile_out = unpack(weight_out[tiles.leaf], out_width, width).mT.double()  # (T, w, H_out)
        out = _leaf_outputs(
            q - zero, scale, leaf, (scale_in.view(-1, width), bias_in, scale_out, bias_out), activation,
            tiles.products, tile_in, tile_out,
        )  # fmt: skip
        y = y + c.unsqueeze(1) * out
    return y.to(x.dtype)


# ---- trees of single neurons ----


def check_quantized_arguments(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    scale_out: Tensor,
    output_scale: Tensor,
    trees: int,
    depth: int,
    activation: str,
) -> None:
    """Check the arguments of the op; every backend does so before it computes.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    floats = (weight_in, bias_in, scale_out, output_scale)
    nodes = trees * ((2 << depth) - 1) if depth >= 0 else 0
    if (  # all is well, as in check_quantized_leaf_arguments
        activation in ACTIVATIONS
        and nodes > 0
        and x.dim() == 2
        and x.dtype in INPUT_DTYPES
        and x.shape[1] > 0
        and weight_in.shape == (nodes, x.shape[1])
        and (bias_in is None or bias_in.shape == (nodes,))
        and scale_out.shape == (nodes,)
        and output_scale.dim() == 1
        and (out_width := output_scale.shape[0]) > 0
        and weight_out.shape == (nodes, out_width)
        and weight_out.dtype == torch.int8
        and weight_out.device == x.device
        and all(t is None or (t.dtype == torch.float32 and t.device == x.device) for t in floats)
    ):
        return
    _check_call(x, trees, depth, activation)
    out_width = output_scale.numel()
    if x.shape[1] == 0 or out_width == 0:
        raise ValueError(f"x is {x.shape[1]} wide and y is {out_width} wide; expected at least 1")
    check_tensors(
        x.device,
        weight_in=(weight_in, torch.float32, (nodes, x.shape[1])),
        bias_in=(bias_in, torch.float32, (nodes,)),
        weight_out=(weight_out, torch.int8, (nodes, out_width)),
        scale_out=(scale_out, torch.float32, (nodes,)),
        output_scale=(output_scale, torch.float32, (out_width,)),
    )


def fff_int8_forward(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    scale_out: Tensor,
    output_scale: Tensor,
    trees: int,
    depth: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Walk every tree for every row and sum what the visited nodes contribute.

    Args:
        x: (N, H) float32, bfloat16 or float16. weight_in (P*n, H), bias_in (P*n,) or None: float32.
        weight_out: (P*n, H_out) int8; its row k is scale_out[k] * output_scale * q[k].
        scale_out (P*n,), output_scale (H_out,): float32.
        trees, depth: P and D. activation: a key of `ACTIVATIONS`.
    Returns:
        y (N, H_out) in the dtype of x, accumulated in float32; visited nodes (N, P, D+1) int32.
    Raises:
        ValueError: as `check_quantized_arguments`.
    """
    check_quantized_arguments(
        x, weight_in, bias_in, weight_out, scale_out, output_scale, trees, depth, activation
    )  # fmt: skip
    visited, logits = walk(x.float(), weight_in, bias_in, trees, depth)
    rows = parameter_rows(visited, depth).flatten(1)  # (N, P, D+1) -> (N, K)
    coefficients = ACTIVATIONS[activation](logits.flatten(1)) * scale_out[rows]
    y = gathered_sum(coefficients, weight_out, rows) * output_scale
    return y.to(x.dtype), visited


def fff_int8_traceable(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    scale_out: Tensor,
    output_scale: Tensor,
    trees: int,
    depth: int,
    activation: str,
) -> Tensor:
    """The same from ATen operations every exporter knows: -> y (N, H_out)."""
    nodes = torch.zeros(x.shape[0], trees, dtype=torch.int64, device=x.device)
    y = torch.zeros(x.shape[0], output_scale.shape[0], dtype=torch.float32, device=x.device)
    for _ in range(depth + 1):
        rows = parameter_rows(nodes.unsqueeze(-1), depth).squeeze(-1)  # (N, P)
        logits = (x.float().unsqueeze(1) * weight_in[rows]).sum(-1)  # (N, P, H) -> (N, P)
        if bias_in is not None:
            logits = logits + bias_in[rows]
        coefficients = ACTIVATIONS[activation](logits) * scale_out[rows]
        y = y + (coefficients.unsqueeze(-1) * weight_out[rows].float()).sum(1)  # (N, P, H_out) -> (N, H_out)
        nodes = step_down(nodes, logits)
    return (y * output_scale).to(x.dtype)
