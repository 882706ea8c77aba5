"""Many tokens: subtrees as matrix products, tokens sorted by the subtree they enter.

A tree of more than `MAX_LEVELS` levels is cut in two. Every node of the upper part is computed for every token, and
the path picked afterwards; then tokens are sorted by the lower subtree they enter, and each of its nodes is computed
for the tokens of that group alone: 126 of 4095 nodes, on tensor cores. The output takes the same two products, the
activations of nodes off the path being zero. What a row gets depends neither on its tile nor on other rows. Sums are
float32, logits are never rounded to TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate

MAX_LEVELS = 7  # of one part: 127 nodes
BLOCK_ROWS, BLOCK_COLUMNS = 64, 64


def split_levels(depth: int) -> tuple[int, int]:
    """Levels of the upper and of the lower part of a tree; a small tree is all lower part.

    Args:
        depth: 0 to 12.

    Returns:
        Two numbers that sum up to depth + 1; the second is 1 to `MAX_LEVELS`, the first at most the second.
    """
    levels = depth + 1
    upper = 0 if levels <= MAX_LEVELS else levels // 2
    return upper, levels - upper


@triton.jit
def upper_paths(
    x_ptr,  # (N, H)
    weight_in_ptr,  # (P*n, H)
    bias_in_ptr,  # (P*n,), or anything without HAS_BIAS
    visited_ptr,  # (N, P, D+1) int32
    logits_ptr,  # (N, P, D+1) float32
    entry_ptr,  # (P, N) int32: the lower subtree that a token enters
    rows,  # N
    width,  # H
    trees,  # P
    DEPTH: tl.constexpr,
    UPPER: tl.constexpr,
    NODES: tl.constexpr,  # 2^UPPER, at least 16
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,  # operands of the logits' products as float32
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Path of a tile of tokens through the upper part of one tree."""
    tree = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    column = tl.arange(0, NODES)
    first = tree * (2 * (1 << DEPTH) - 1)
    products = tl.zeros([BLOCK_N, NODES], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row[:, None] * width + k[None, :], mask=inside[:, None] & (k < width)[None, :], other=0.0)
        known = (column < (1 << UPPER) - 1)[:, None] & (k < width)[None, :]
        w = tl.load(weight_in_ptr + (first + column)[:, None] * width + k[None, :], mask=known, other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        products = tl.dot(x, tl.trans(w), products, input_precision="ieee")
    node = tl.zeros([BLOCK_N], tl.int32)
    for level in tl.static_range(UPPER):
        # Chosen, not multiplied: whatever other nodes hold stays there.
        logit = tl.sum(tl.where(column[None, :] == node[:, None], products, 0.0), axis=1)
        if HAS_BIAS:
            logit += tl.load(bias_in_ptr + first + node).to(tl.float32)
        visit = (row * trees + tree) * (DEPTH + 1) + level
        tl.store(visited_ptr + visit, node, mask=inside)
        tl.store(logits_ptr + visit, logit, mask=inside)
        node = 2 * node + 1 + (logit > 0).to(tl.int32)
    tl.store(entry_ptr + tree * rows + row, node - ((1 << UPPER) - 1), mask=inside)


@triton.jit
def lower_paths(
    x_ptr,  # (N, H)
    weight_in_ptr,  # (P*n, H)
    bias_in_ptr,  # (P*n,), or anything without HAS_BIAS
    visited_ptr,  # (N, P, D+1) int32
    logits_ptr,  # (N, P, D+1) float32
    order_ptr,  # (N,) int64: tokens sorted by group
    ends_ptr,  # (G,) int64: where each group ends in that order
    tile_ends_ptr,  # (G,) int64: how many tiles it and those before it take
    tree,
    width,  # H
    trees,  # P
    DEPTH: tl.constexpr,
    UPPER: tl.constexpr,
    LOWER: tl.constexpr,
    NODES: tl.constexpr,  # 2^LOWER, at least 16
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,  # operands of the logits' products as float32
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Path of a tile of one group's tokens through its lower subtree."""
    tile = tl.program_id(0).to(tl.int64)
    group = tl.sum((tl.load(tile_ends_ptr + tl.arange(0, 1 << UPPER)) <= tile).to(tl.int64), axis=0)
    if group < (1 << UPPER):  # there are as many tiles as groups could need at most
        before = tl.maximum(group - 1, 0)
        start = tl.where(group > 0, tl.load(ends_ptr + before), 0)
        first_tile = tl.where(group > 0, tl.load(tile_ends_ptr + before), 0)
        place = start + (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = place < tl.load(ends_ptr + group)
        row = tl.load(order_ptr + place, mask=inside, other=0)
        first = tree.to(tl.int64) * (2 * (1 << DEPTH) - 1)
        column = tl.arange(0, NODES)
        depth = tl.zeros([NODES], tl.int32)  # of a node inside its subtree
        for level in tl.static_range(1, LOWER):
            depth += (column + 1 >= (1 << level)).to(tl.int32)
        node_of = ((1 << UPPER) << depth) - 1 + (group << depth) + column + 1 - (1 << depth)
        known = column < (1 << LOWER) - 1
        products = tl.zeros([BLOCK_N, NODES], tl.float32)
        for k_start in range(0, width, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            in_k = (k < width)[None, :]
            x = tl.load(x_ptr + row[:, None] * width + k[None, :], mask=inside[:, None] & in_k, other=0.0)
            w_rows = (first + node_of)[:, None] * width
            w = tl.load(weight_in_ptr + w_rows + k[None, :], mask=known[:, None] & in_k, other=0.0)
            if WIDEN:
                x, w = x.to(tl.float32), w.to(tl.float32)
            products = tl.dot(x, tl.trans(w), products, input_precision="ieee")
        local = tl.zeros([BLOCK_N], tl.int32)
        for level in tl.static_range(LOWER):
            node = ((1 << (UPPER + level)) - 1) + (group << level) + local + 1 - (1 << level)
            logit = tl.sum(tl.where(column[None, :] == local[:, None], products, 0.0), axis=1)
            if HAS_BIAS:
                logit += tl.load(bias_in_ptr + first + node, mask=inside, other=0.0).to(tl.float32)
            visit = (row * trees + tree) * (DEPTH + 1) + UPPER + level
            tl.store(visited_ptr + visit, node.to(tl.int32), mask=inside)
            tl.store(logits_ptr + visit, logit, mask=inside)
            local = 2 * local + 1 + (logit > 0).to(tl.int32)


@triton.jit
def add_part(
    total,  # (BLOCK_N, BLOCK_K) float32
    weight_out_ptr,
    bad_ptr,
    visited_ptr,
    logits_ptr,
    visit,  # (BLOCK_N,): where a token's visit of the part's root is stored
    inside,  # (BLOCK_N,)
    first,  # row of the tree's root
    subtree,  # number of the part's root in its level
    out,  # (BLOCK_K,) columns
    out_width,
    LEVELS: tl.constexpr,
    BASE: tl.constexpr,  # level of the part's root
    NODES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUNDING: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):
    """total and what one part of the tree adds to it."""
    in_out = (out < out_width)[None, :]
    column = tl.arange(0, NODES)
    depth = tl.zeros_like(column)  # of a node inside the part
    path = tl.zeros([total.shape[0], NODES], tl.float32)  # activations on the path
    for level in tl.static_range(LEVELS):
        depth += (column + 1 >= (2 << level)).to(tl.int32)
        node = tl.load(visited_ptr + visit + level, mask=inside, other=0)
        value = activate(tl.load(logits_ptr + visit + level, mask=inside, other=0.0), ACTIVATION)
        local = node - ((1 << (BASE + level)) - 1) - (subtree << level) + (1 << level) - 1
        path = tl.where(column[None, :] == local[:, None], value[:, None], path)
        bad = tl.load(bad_ptr + first + node, mask=inside, other=0) != 0
        if tl.max(bad.to(tl.int32), axis=0) > 0:
            rows = (first + node)[:, None] * out_width
            values = tl.load(weight_out_ptr + rows + out[None, :], mask=bad[:, None] & in_out, other=0.0)
            total += tl.where(bad[:, None], value[:, None] * values.to(tl.float32), 0.0)
    depth = tl.minimum(depth, LEVELS - 1)
    node_of = ((1 << BASE) << depth) - 1 + (subtree << depth) + column + 1 - (1 << depth)
    known = column < (1 << LEVELS) - 1
    # Rows that are not finite would reach tokens that never visit them, 0 * Inf being NaN: they came above, alone.
    good = known & (tl.load(bad_ptr + first + node_of, mask=known, other=1) == 0)
    rows = (first + node_of)[:, None] * out_width
    weights = tl.load(weight_out_ptr + rows + out[None, :], mask=good[:, None] & in_out, other=0.0)
    if AS_FLOAT:
        weights = weights.to(tl.float32)
    return tl.dot(path.to(weights.dtype), weights, total, input_precision=ROUNDING)


@triton.jit
def outputs(
    weight_out_ptr,  # (P*n, H_out)
    bad_ptr,  # (P*n,) int8: rows of weight_out that hold NaN or Inf
    y_ptr,  # (N, H_out)
    visited_ptr,  # (N, P, D+1) int32
    logits_ptr,  # (N, P, D+1) float32
    order_ptr,  # (N,) int64, as for lower_paths; so are the next two
    ends_ptr,
    tile_ends_ptr,
    tree,
    out_width,  # H_out
    trees,  # P
    DEPTH: tl.constexpr,
    UPPER: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER_NODES: tl.constexpr,  # 2^UPPER, at least 16
    LOWER_NODES: tl.constexpr,  # 2^LOWER, at least 16
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,  # to what y holds: trees after the first
    ROUNDING: tl.constexpr,  # input precision of the products
    AS_FLOAT: tl.constexpr,  # their operands as float32
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Output of a tile of one group's tokens, a block of columns: one product for each part of the tree."""
    tile = tl.program_id(0).to(tl.int64)
    group = tl.sum((tl.load(tile_ends_ptr + tl.arange(0, 1 << UPPER)) <= tile).to(tl.int64), axis=0)
    if group < (1 << UPPER):
        before = tl.maximum(group - 1, 0)
        start = tl.where(group > 0, tl.load(ends_ptr + before), 0)
        first_tile = tl.where(group > 0, tl.load(tile_ends_ptr + before), 0)
        place = start + (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = place < tl.load(ends_ptr + group)
        row = tl.load(order_ptr + place, mask=inside, other=0)
        first = tree.to(tl.int64) * (2 * (1 << DEPTH) - 1)
        out = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        visit = (row * trees + tree) * (DEPTH + 1)
        if UPPER > 0:
            total = add_part(
                total, weight_out_ptr, bad_ptr, visited_ptr, logits_ptr, visit, inside, first, group * 0, out,
                out_width, UPPER, 0, UPPER_NODES, ACTIVATION, ROUNDING, AS_FLOAT,
            )  # fmt: skip
        total = add_part(
            total, weight_out_ptr, bad_ptr, visited_ptr, logits_ptr, visit + UPPER, inside, first, group, out,
            out_width, LOWER, UPPER, LOWER_NODES, ACTIVATION, ROUNDING, AS_FLOAT,
        )  # fmt: skip
        keep = inside[:, None] & (out < out_width)[None, :]
        y_place = y_ptr + row[:, None] * out_width + out[None, :]
        if ADD:
            total += tl.load(y_place, mask=keep, other=0.0)
        tl.store(y_place, total.to(y_ptr.dtype.element_ty), mask=keep)


def _groups(entry: Tensor | None, rows: int, count: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens sorted by group (N,), where each ends (G,), and how many tiles it and those before it take (G,)."""
    if entry is None:
        order = torch.arange(rows, device=like.device)
        ends = torch.full((1,), rows, dtype=torch.int64, device=like.device)
    else:
        entry, order = torch.sort(entry, stable=True)
        ends = torch.searchsorted(entry, torch.arange(count, dtype=entry.dtype, device=like.device), right=True)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    return order, ends, ((sizes + BLOCK_ROWS - 1) // BLOCK_ROWS).cumsum(0)


def block_columns(width: int, out_width: int) -> int:
    """Columns of a product's block: a function of the widths alone, because it fixes the order of summation."""
    return min(BLOCK_COLUMNS, max(16, 1 << (max(width, out_width) - 1).bit_length()))


def run_subtrees(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    y: Tensor,
    visited: Tensor,
    logits: Tensor,
    activation_code: int,
    tf32: bool,
    widen: bool,
) -> None:
    """Walk every tree for every token; all tensors contiguous, N at least 1. No step waits for the device.

    Args:
        x: (N, H). weight_in: (P*n, H). bias_in: (P*n,) or None. weight_out: (P*n, H_out).
        y: (N, H_out), written; float32 where P > 1.
        visited, logits: (N, P, D+1) int32 and float32, written.
        activation_code: as in activations.py.
        tf32: whether the output's float32 products may be rounded to TF32; decisions never are.
        widen: give the logits' products float32 operands; the same sums, for an interpreter that cannot do bfloat16.
    """
    rows, trees, levels = visited.shape
    upper, lower = split_levels(levels - 1)
    width, out_width = x.shape[1], weight_out.shape[1]
    bad = (~torch.isfinite(weight_out).all(dim=1)).to(torch.int8)
    block = {"BLOCK_N": BLOCK_ROWS, "BLOCK_K": block_columns(width, out_width)}
    shape = {"DEPTH": levels - 1, "UPPER": upper, "HAS_BIAS": bias_in is not None, "WIDEN": widen}
    bias = y if bias_in is None else bias_in
    entry = None
    tiles = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    if upper:
        entry = torch.empty(trees, rows, dtype=torch.int32, device=x.device)
        upper_paths[(tiles, trees)](
            x, weight_in, bias, visited, logits, entry, rows, width, trees,
            NODES=max(16, 1 << upper), **shape, **block,
        )  # fmt: skip
    # Activations of 8 binary digits would show in y, and those of float16 may overflow: TF32 has 11 and the range.
    half = x.dtype != torch.float32
    # A tile more for every group: its last one need not be full.
    grid, columns = tiles + (1 << upper) - 1, triton.cdiv(out_width, block["BLOCK_K"])
    for tree in range(trees):
        groups = _groups(None if entry is None else entry[tree], rows, 1 << upper, x)
        lower_paths[(grid,)](
            x, weight_in, bias, visited, logits, *groups, tree, width, trees,
            LOWER=lower, NODES=max(16, 1 << lower), **shape, **block,
        )  # fmt: skip
        outputs[(grid, columns)](
            weight_out, bad, y, visited, logits, *groups, tree, out_width, trees,
            DEPTH=levels - 1,
            UPPER=upper,
            LOWER=lower,
            UPPER_NODES=max(16, 1 << upper),
            LOWER_NODES=max(16, 1 << lower),
            ACTIVATION=activation_code,
            ADD=tree > 0,
            ROUNDING="tf32" if tf32 or half else "ieee",
            AS_FLOAT=half,
            **block,
        )  # fmt: skip
