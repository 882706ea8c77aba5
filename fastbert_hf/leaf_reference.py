# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Leaf trees in plain PyTorch: the definition that every backend is tested against.

Notation: N rows (tokens), H input width, H_out output width, P trees, D depth, m = 2^D leaves of w neurons a tree,
r = m - 1 routers a tree, numbered breadth first (root 0, children 2i + 1 and 2i + 2). Router i of tree p is row
p * r + i of `router`; neuron k of leaf j of tree p is row (p * m + j) * w + k of `weight_in` and `weight_out`.

Rows are sorted by leaf, and each leaf does one small matrix product each way for the rows that chose it.
Source: arXiv 2308.14711 for depth and leaf width; the confidence is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .fff_reference import (
    ACTIVATION_BACKWARDS,
    ACTIVATIONS,
    FLOAT_DTYPES,
    accumulation_dtype,
    check_call,
    check_types,
    gathered_dots,
    gathered_sum,
    step_down,
)

MAX_LEAF_DEPTH = 12  # of a layer's trees: 4096 leaves a tree


def leaves_per_tree(depth: int) -> int:
    """Number m of leaves of a tree of depth `depth`: 2^depth. It has one router fewer."""
    return 2**depth


def check_leaf_arguments(
    x: Tensor,
    router: Tensor,
    threshold: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    trees: int,
    depth: int,
    activation: str,
) -> int:
    """Check the arguments of the op; every backend does so before it computes.

    Returns: the leaf width w.
    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    dtype, device, parameters = x.dtype, x.device, (router, threshold, weight_in, bias_in, weight_out, bias_out)
    if (  # all is well: the rest only finds the words, which would take longer than a kernel at N = 1
        activation in ACTIVATIONS
        and trees >= 1
        and depth >= 0
        and x.dim() == weight_in.dim() == weight_out.dim() == 2
        and (neurons := weight_in.shape[0]) > 0
        and neurons % (leaves := trees << depth) == 0
        and router.shape == (leaves - trees, width := x.shape[1])
        and threshold.shape == (leaves - trees,)
        and (weight_in.shape[1], weight_out.shape[0]) == (width, neurons)
        and dtype in FLOAT_DTYPES
        and (bias_in is None or bias_in.shape == (neurons,))
        and (bias_out is None or bias_out.shape == (leaves, weight_out.shape[1]))
        and all(t is None or (t.dtype == dtype and t.device == device) for t in parameters)
    ):
        return neurons // leaves
    return _explain_arguments(x, *parameters, trees, depth, activation)


def _explain_arguments(
    x, router, threshold, weight_in, bias_in, weight_out, bias_out, trees: int, depth: int, activation: str
) -> int:
    """The checks of `check_leaf_arguments`, one by one, for their messages."""
    check_call(x, weight_in, weight_out, trees, depth, activation)
    leaves = trees * leaves_per_tree(depth)
    routers, neurons = leaves - trees, weight_in.shape[0]
    if neurons == 0 or neurons % leaves:
        raise ValueError(
            f"weight_in has {neurons} rows; expected a positive multiple of {leaves}, the leaves of {trees} trees of "
            f"depth {depth}"
        )
    width, out_width = x.shape[1], weight_out.shape[1]
    expected = {
        "router": (router, (routers, width)),
        "threshold": (threshold, (routers,)),
        "weight_in": (weight_in, (neurons, width)),
        "bias_in": (bias_in, (neurons,)),
        "weight_out": (weight_out, (neurons, out_width)),
        "bias_out": (bias_out, (leaves, out_width)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    check_types(x, *(tensor for tensor, _ in expected.values()))
    return neurons // leaves


# ---- routes ----


def find_routes(
    x: Tensor, router: Tensor, threshold: Tensor, trees: int, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the routers: l = <x, router[node]> - threshold[node]; l > 0 goes right, otherwise (0, -0, NaN) left.

    Args:
        x: (N, H). router: (P*r, H). threshold: (P*r,).
    Returns:
        leaves (N, P) int32, counted from the left of their tree; deciders (N, P) int32, the router of the least
        certain decision, the first of equals (0 at depth 0); margins (N, P), its l, in the accumulation dtype
        (infinite at depth 0).
    """
    dtype = accumulation_dtype(x.dtype)
    nodes = x.new_zeros(x.shape[0], trees, dtype=torch.int32)
    if depth == 0:
        return nodes, nodes.clone(), x.new_full(nodes.shape, torch.inf, dtype=dtype)
    first_router = torch.arange(trees, device=x.device, dtype=torch.int32) * (leaves_per_tree(depth) - 1)
    visited, logits = [], []
    for _ in range(depth):
        rows = nodes + first_router  # (N, P)
        visited.append(nodes)
        logits.append(gathered_dots(x, router, rows) - threshold[rows])
        nodes = step_down(nodes, logits[-1])
    margin, decider = _least_certain(torch.stack(logits, -1))
    deciders = torch.stack(visited, -1).gather(-1, decider.unsqueeze(-1)).squeeze(-1)
    return nodes - (leaves_per_tree(depth) - 1), deciders, margin


def _least_certain(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) -> the logit of least absolute value and its place, the first of equals; NaN counts as the least."""
    certainty = logits.abs()
    least = certainty.min(-1, keepdim=True).values
    is_least = (certainty == least) | certainty.isnan()
    places = torch.arange(logits.shape[-1], device=logits.device)
    place = torch.where(is_least, places, logits.shape[-1]).min(-1).values  # torch.min promises no order of equals
    return logits.gather(-1, place.unsqueeze(-1)).squeeze(-1), place


def confidence_of(margins: Tensor) -> Tensor:
    """c = sigmoid(|l|) of the least certain decision: 0.5 to 1."""
    return margins.abs().sigmoid()


# ---- products by leaf ----


class RowsByLeaf:
    """The rows of one tree sorted by leaf, and products of every leaf with its rows."""

    def __init__(self, leaves: Tensor, num_leaves: int):
        self.order = leaves.argsort(stable=True)  # (N,)
        self.leaf = leaves[self.order]
        self.counts = leaves.bincount(minlength=num_leaves)

    def _groups(self) -> list[tuple[int, int, int]]:
        """(leaf, begin, end) of every leaf that has rows."""
        groups, begin = [], 0
        for leaf, count in enumerate(self.counts.tolist()):
            if count:
                groups.append((leaf, begin, begin + count))
            begin += count
        return groups

    def products(self, vectors: Tensor, weight: Tensor) -> Tensor:
        """vectors[i] @ weight[leaf of i]: (N, K) sorted, (m, K, J) -> (N, J) in the dtype of `vectors`."""
        if can_group(vectors, weight):
            return F.grouped_mm(vectors.to(weight.dtype), weight, offs=self.counts.cumsum(0).to(torch.int32)).to(
                vectors.dtype
            )
        parts = weight.unbind(0)  # once: indexing in a loop makes autograd allocate the whole for every leaf
        out = vectors.new_empty(vectors.shape[0], weight.shape[2])
        for leaf, begin, end in self._groups():
            out[begin:end] = vectors[begin:end] @ parts[leaf].to(vectors.dtype)
        return out

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """sum over the rows of each leaf of left^T right: (N, J) and (N, K), sorted -> (m, J, K)."""
        out = left.new_zeros(self.counts.shape[0], left.shape[1], right.shape[1])
        for leaf, begin, end in self._groups():
            out[leaf] = left[begin:end].T @ right[begin:end]
        return out


def can_group(vectors: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped matrix product takes these: bfloat16 weights on a GPU, rows of whole 16 bytes."""
    return (
        weight.is_cuda
        and weight.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and vectors.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
    )


# ---- the op ----


def leaf_forward(
    x: Tensor,
    router: Tensor,
    threshold: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    trees: int,
    depth: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route every row to one leaf of every tree and sum what the leaves say, scaled by the confidence.

    Args:
        x: (N, H). router: (P*r, H). threshold: (P*r,). weight_in: (P*m*w, H). bias_in: (P*m*w,) or None.
        weight_out: (P*m*w, H_out). bias_out: (P*m, H_out) or None. One floating dtype.
        trees, depth: P and D. activation: a key of `ACTIVATIONS`.
    Returns:
        y (N, H_out) in the dtype of x; leaves, deciders and margins as `find_routes`; logits (N, P, w) of the leaves'
        neurons in the accumulation dtype.
    Raises:
        ValueError: as `check_leaf_arguments`.
    """
    width = check_leaf_arguments(
        x, router, threshold, weight_in, bias_in, weight_out, bias_out, trees, depth, activation
    )
    dtype, num_leaves = accumulation_dtype(x.dtype), leaves_per_tree(depth)
    leaves, deciders, margins = find_routes(x, router, threshold, trees, depth)
    weight_in = weight_in.view(trees, num_leaves, width, x.shape[1]).transpose(-1, -2)  # (P, m, H, w)
    weight_out = weight_out.view(trees, num_leaves, width, weight_out.shape[1])  # (P, m, w, H_out)
    confidence = confidence_of(margins)
    logits = x.new_empty(x.shape[0], trees, width, dtype=dtype)
    y = x.new_zeros(x.shape[0], weight_out.shape[-1], dtype=dtype)
    for tree in range(trees):
        rows = RowsByLeaf(leaves[:, tree], num_leaves)
        sorted_logits = rows.products(x[rows.order].to(dtype), weight_in[tree])  # (N, w)
        if bias_in is not None:
            sorted_logits = sorted_logits + bias_in.view(trees, num_leaves, width)[tree, rows.leaf]
        logits[rows.order, tree] = sorted_logits
        c = confidence[rows.order, tree].unsqueeze(1)
        out = rows.products(c * ACTIVATIONS[activation](sorted_logits), weight_out[tree])  # (N, H_out)
        if bias_out is not None:
            out = out + c * bias_out.view(trees, num_leaves, weight_out.shape[-1])[tree, rows.leaf]
        y[rows.order] += out
    return y.to(x.dtype), leaves, deciders, margins, logits


def leaf_backward(
    grad_y: Tensor,
    x: Tensor,
    router: Tensor,
    threshold: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    leaves: Tensor,
    deciders: Tensor,
    margins: Tensor,
    logits: Tensor,
    activation: str,
    output_mask: list[bool],
) -> list[Tensor | None]:
    """Gradients with the decisions held constant; the confidence gives some to the least certain decision's router.

    Args:
        grad_y: (N, H_out). leaves, deciders, margins, logits: as `leaf_forward` returned them. The rest as there.
        output_mask: which of the gradients of (x, router, threshold, weight_in, bias_in, weight_out, bias_out) are
            wanted.
    Returns: seven dense gradients in the shapes and dtypes of the inputs, None where unwanted.
    """
    dtype, trees, width = logits.dtype, logits.shape[1], logits.shape[2]
    num_leaves = weight_in.shape[0] // (trees * width)
    inputs = (x, router, threshold, weight_in, bias_in, weight_out, bias_out)
    grads = [t.new_zeros(t.shape, dtype=dtype) if w and t is not None else None for t, w in zip(inputs, output_mask)]
    grad_x, grad_router, grad_threshold, *of_neurons, grad_bias_out = grads
    by_tree = [None if g is None else g.view(trees, num_leaves, width, *g.shape[1:]) for g in of_neurons]
    by_tree.append(None if grad_bias_out is None else grad_bias_out.view(trees, num_leaves, grad_y.shape[1]))
    weight_in = weight_in.view(trees, num_leaves, width, x.shape[1])
    weight_out = weight_out.view(trees, num_leaves, width, weight_out.shape[1])
    confidence = confidence_of(margins)
    grad_y, wide_x = grad_y.to(dtype), x.to(dtype)
    for tree in range(trees):
        rows = RowsByLeaf(leaves[:, tree], num_leaves)
        c = confidence[rows.order, tree].unsqueeze(1)
        of_rows = (grad_y[rows.order], wide_x[rows.order], logits[rows.order, tree], c)
        tree_bias = None if bias_out is None else bias_out.view(trees, num_leaves, grad_y.shape[1])[tree]
        tree_grads = [None if g is None else g[tree] for g in by_tree]
        grad_c, grad_z = _leaf_gradients(rows, *of_rows, weight_out[tree], tree_bias, activation, tree_grads)
        if grad_x is not None:
            grad_x[rows.order] += rows.products(grad_z, weight_in[tree])
        if num_leaves == 1:
            continue
        grad_l = grad_c * (c * (1 - c)).squeeze(1) * margins[rows.order, tree].sign()  # (N,)
        decider = deciders[rows.order, tree] + tree * (num_leaves - 1)
        if grad_router is not None:
            grad_router.index_add_(0, decider, grad_l.unsqueeze(1) * wide_x[rows.order])
        if grad_threshold is not None:
            grad_threshold.index_add_(0, decider, -grad_l)
        if grad_x is not None:
            grad_x[rows.order] += gathered_sum(grad_l.unsqueeze(1), router, decider.unsqueeze(1))
    return [g if g is None else g.to(t.dtype) for g, t in zip(grads, inputs)]


def _leaf_gradients(
    rows: RowsByLeaf,
    grad_y: Tensor,
    x: Tensor,
    logits: Tensor,
    c: Tensor,
    weight_out: Tensor,
    bias_out: Tensor | None,
    activation: str,
    grads: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """One tree's leaves backward, rows sorted by leaf. Fills `grads` of weight_in, bias_in, weight_out, bias_out.

    Args:
        grad_y: (N, H_out). x: (N, H). logits: (N, w). c: (N, 1). weight_out: (m, w, H_out). bias_out: (m, H_out).
        grads: (m, w, H), (m, w), (m, w, H_out), (m, H_out), None where unwanted.
    Returns: gradients of the confidence (N,) and of the logits (N, w).
    """
    grad_in, grad_bias_in, grad_out, grad_bias_out = grads
    hidden = ACTIVATIONS[activation](logits)
    grad_hidden = rows.products(grad_y, weight_out.transpose(-1, -2))  # (N, w), before the confidence
    grad_c = (hidden * grad_hidden).sum(1)
    if bias_out is not None:
        grad_c = grad_c + (grad_y * bias_out[rows.leaf]).sum(1)
    grad_z = ACTIVATION_BACKWARDS[activation](c * grad_hidden, logits)
    if grad_in is not None:
        grad_in.copy_(rows.outer(grad_z, x))
    if grad_bias_in is not None:
        grad_bias_in.index_add_(0, rows.leaf, grad_z)
    if grad_out is not None:
        grad_out.copy_(rows.outer(c * hidden, grad_y))
    if grad_bias_out is not None:
        grad_bias_out.index_add_(0, rows.leaf, c * grad_y)
    return grad_c, grad_z
