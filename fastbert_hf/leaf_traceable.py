# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Leaf trees from ATen operations every exporter knows, differentiable: what exported programs and ONNX files hold.

Notation as in leaf_reference.py. How many rows a leaf has is known only when a graph runs. So its rows are cut into
tiles of one size, and every tile gathers the weights of its leaf; all tiles are one batched product.
"""

import torch
from torch import Tensor

from .fff_reference import ACTIVATIONS, accumulation_dtype, step_down
from .leaf_reference import leaves_per_tree

EXTRA_ROWS = 4  # of a tile, beside the mean number of rows of a leaf


def traceable_route(x: Tensor, router: Tensor, threshold: Tensor, tree: int, depth: int) -> tuple[Tensor, Tensor]:
    """Each row's leaf in one tree, among the leaves of all trees, and its confidence: (N,) int64, (N,) floating."""
    dtype, num_leaves = accumulation_dtype(x.dtype), leaves_per_tree(depth)
    nodes = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    c = torch.ones(x.shape[0], dtype=dtype, device=x.device)
    certainty = None
    for _ in range(depth):
        rows = nodes + tree * (num_leaves - 1)
        logits = (x.to(dtype) * router[rows].to(dtype)).sum(-1) - threshold[rows]  # (N,)
        found = logits.abs()
        if certainty is None:
            certainty = found
        else:  # torch.minimum would share the gradient among equals
            certainty = torch.where((certainty <= found) | certainty.isnan(), certainty, found)
        nodes = step_down(nodes, logits)
    if certainty is not None:
        c = certainty.sigmoid()
    return nodes + (1 + tree * num_leaves - num_leaves), c


class TilesByLeaf:
    """The rows of one tree in tiles of R = N / m + 4 rows of one leaf, filled up with zeros.

    Args:
        leaves: (N,) int64, the leaf of each row, among those of all trees. tree: whose they are.
    Attributes:
        leaf: (T,) int64, the leaf of each tile, T <= N / R + m; where there is only one, a slice.
        rows: (T, R) int64, the row at each place of a tile; N where there is none.
        slot: (N,) int64, the place of each row among the T * R.
    """

    def __init__(self, leaves: Tensor, tree: int, num_leaves: int):
        self.leaf = slice(tree, tree + 1)
        if num_leaves == 1:
            return
        num_rows, device = leaves.shape[0], leaves.device
        in_tile = torch.arange(num_rows // num_leaves + EXTRA_ROWS, device=device)  # (R,)
        size = in_tile[-1] + 1  # a tensor: exporters have no remainder by a size
        leaves, order = (leaves - tree * num_leaves).sort()
        counts = torch.zeros(num_leaves, dtype=leaves.dtype, device=device)
        ends = counts.scatter_add(0, leaves, torch.ones_like(leaves)).cumsum(0)
        begins = torch.cat([ends.new_zeros(1), ends[:-1]])
        place = (torch.arange(num_rows, device=device) - begins[leaves]) % size  # of each sorted row in its tile
        first = (place == 0).nonzero().squeeze(1)  # (T,) sorted rows
        sorted_rows = first.unsqueeze(1) + in_tile  # (T, R)
        filled = sorted_rows < ends[leaves[first]].unsqueeze(1)
        self.leaf = leaves[first] + tree * num_leaves
        order_and_zero = torch.cat([order, order.new_full((1,), num_rows)])
        self.rows = order_and_zero[torch.where(filled, sorted_rows, num_rows)]  # (T, R), N for the row of zeros
        slot = ((place == 0).cumsum(0) - 1) * size + place
        self.slot = torch.empty_like(slot).scatter(0, order, slot)  # (N,) places in (T * R)

    def products(self, vectors: Tensor, weight: Tensor) -> Tensor:
        """Products of rows with their leaf's weights: (N, K), (T, K, J) of the tiles' leaves -> (N, J)."""
        if isinstance(self.leaf, slice):
            return vectors @ weight[0]
        vectors = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        return torch.bmm(vectors[self.rows], weight).flatten(0, 1)[self.slot]


def leaf_traceable(
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
) -> Tensor:
    """Arguments as `leaf_reference.leaf_forward` -> y (N, H_out)."""
    dtype, num_leaves = accumulation_dtype(x.dtype), leaves_per_tree(depth)
    width, out_width = weight_in.shape[0] // (trees * num_leaves), weight_out.shape[1]
    weight_in = weight_in.view(-1, width, x.shape[1])  # (P * m, w, H)
    weight_out = weight_out.view(-1, width, out_width)  # (P * m, w, H_out)
    y = torch.zeros(x.shape[0], out_width, dtype=dtype, device=x.device)
    for tree in range(trees):
        leaf, c = traceable_route(x, router, threshold, tree, depth)
        tiles = TilesByLeaf(leaf, tree, num_leaves)
        logits = tiles.products(x.to(dtype), weight_in[tiles.leaf].mT.to(dtype))  # (N, w)
        if bias_in is not None:
            logits = logits + bias_in.view(-1, width)[leaf]
        out = tiles.products(ACTIVATIONS[activation](logits), weight_out[tiles.leaf].to(dtype))
        if bias_out is not None:
            out = out + bias_out[leaf]
        y = y + c.unsqueeze(1) * out
    return y.to(x.dtype)
