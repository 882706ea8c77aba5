"""Kernels over parts of the tree: for each node, the sum over the tokens that visit it of a value times a vector.

A part's tokens are cut into pieces; a piece is a chain of products (nodes x tile of tokens) x (tile x columns), then
the pieces of each part are added in their order. No atomics: the same inputs give the same bits.
"""

import triton
import triton.language as tl

from .groups import PIECE_ENDS, chunk_of_group, tokens_between
from .parts import accurate_dot, are_finite, is_finite, nodes_of_part, path_values


@triton.jit
def part_of_group(group, UPPER: tl.constexpr, LOWER: tl.constexpr):
    """The part that a group's tokens are summed for, by subtree, base and levels; the last group's is the upper."""
    lower = group < (1 << UPPER)
    return tl.where(lower, group, 0), tl.where(lower, UPPER, 0), tl.where(lower, LOWER, UPPER)


@triton.jit
def piece_sum(
    vectors_ptr, values_ptr, visited_ptr, order_ptr, start, end, tree, subtree, base, levels, k, width, trees,
    DEPTH: tl.constexpr, NODES: tl.constexpr, CAREFUL: tl.constexpr, ROUNDING: tl.constexpr, SPLIT: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of one piece, (NODES, BLOCK_K), and those of the values alone, (NODES,).

    A product takes 0 * Inf to nodes that a token does not visit. CAREFUL leaves vectors that are not finite out of it
    and adds them to the nodes on their path alone, one by one: slow, but such a step is lost anyway.
    """
    total, values_total = tl.zeros([NODES, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, NODES], tl.float32)
    for begin in range(start, end, BLOCK_N):
        row, inside, visit = tokens_between(order_ptr, begin, end, tree, trees, DEPTH, BLOCK_N)
        known = inside[:, None] & (k < width)[None, :]
        vectors = tl.load(vectors_ptr + row[:, None] * width + k[None, :], mask=known, other=0.0)
        path = path_values(values_ptr, visited_ptr, visit, inside, subtree, base, levels, NODES)
        values_total += path
        if CAREFUL:
            good = are_finite(vectors)
            vectors = tl.where(good[:, None], vectors, 0.0)
            path = tl.where(good[:, None], path, 0.0)
            for place_of_one in range(begin, tl.minimum(begin + BLOCK_N, end)):
                one = tl.load(order_ptr + place_of_one)
                vector = tl.load(vectors_ptr + one * width + k, mask=k < width, other=0.0).to(tl.float32)
                if tl.min(is_finite(vector).to(tl.int32), axis=0) == 0:
                    node, _ = nodes_of_part(subtree, base, levels, NODES)
                    for level in range(levels):
                        cell_of_one = (one * trees + tree) * (DEPTH + 1) + base + level
                        mine = node == tl.load(visited_ptr + cell_of_one)
                        total += tl.where(mine[:, None], tl.load(values_ptr + cell_of_one) * vector[None, :], 0.0)
        total = accurate_dot(tl.trans(path), vectors, total, ROUNDING, SPLIT, WIDEN)
    return total, tl.sum(values_total, axis=0)


@triton.jit(do_not_specialize=["tree"])
def sum_pieces(
    vectors_ptr,  # (N, W)
    values_ptr,  # (N, P, D+1) float32
    visited_ptr,  # (N, P, D+1) int32
    order_ptr,  # (N,) int64: tokens sorted by the lower part that they enter
    table_ptr,  # (4, GROUPS) int64: as `cut_groups` writes it
    partial_ptr,  # (pieces, NODES, W) float32
    partial_values_ptr,  # (pieces, NODES) float32: sums of the values alone
    tree,
    width,  # W
    trees,  # P
    DEPTH: tl.constexpr,
    UPPER: tl.constexpr,
    LOWER: tl.constexpr,
    NODES: tl.constexpr,
    GROUPS: tl.constexpr,
    PIECE: tl.constexpr,
    ROUNDING: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One piece of one group, BLOCK_K columns of it."""
    group, start, end = chunk_of_group(table_ptr, PIECE_ENDS, GROUPS, PIECE)
    if group < GROUPS:
        subtree, base, levels = part_of_group(group, UPPER, LOWER)
        k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        total, values_total = piece_sum(
            vectors_ptr, values_ptr, visited_ptr, order_ptr, start, end, tree, subtree, base, levels, k, width, trees,
            DEPTH, NODES, False, ROUNDING, SPLIT, WIDEN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if tl.min(is_finite(total).to(tl.int32)) == 0:
            total, values_total = piece_sum(
                vectors_ptr, values_ptr, visited_ptr, order_ptr, start, end, tree, subtree, base, levels, k, width,
                trees, DEPTH, NODES, True, ROUNDING, SPLIT, WIDEN, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        cell = tl.program_id(0).to(tl.int64) * NODES + tl.arange(0, NODES)
        tl.store(partial_ptr + cell[:, None] * width + k[None, :], total, mask=(k < width)[None, :])
        if tl.program_id(1) == 0:
            tl.store(partial_values_ptr + cell, values_total)


@triton.jit(do_not_specialize=["tree"])
def add_pieces(
    partial_ptr,  # (pieces, NODES, W) float32
    partial_values_ptr,  # (pieces, NODES) float32
    table_ptr,  # (4, GROUPS) int64
    result_ptr,  # (P*n, W)
    result_values_ptr,  # (P*n,), or anything without WITH_VALUES
    tree,
    width,  # W
    DEPTH: tl.constexpr,
    UPPER: tl.constexpr,
    LOWER: tl.constexpr,
    NODES: tl.constexpr,
    GROUPS: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The rows of one group's nodes, BLOCK_K columns of them; zero where the group has no token."""
    group = tl.program_id(0).to(tl.int64)
    subtree, base, levels = part_of_group(group, UPPER, LOWER)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = (k < width)[None, :]
    node, known = nodes_of_part(subtree, base, levels, NODES)
    row = tree.to(tl.int64) * (2 * (1 << DEPTH) - 1) + node
    ends_ptr = table_ptr + PIECE_ENDS * GROUPS + group
    total, values_total = tl.zeros([NODES, BLOCK_K], tl.float32), tl.zeros([NODES], tl.float32)
    for piece in range(tl.load(ends_ptr - 1, mask=group > 0, other=0), tl.load(ends_ptr)):
        cell = piece * NODES + tl.arange(0, NODES)
        total += tl.load(partial_ptr + cell[:, None] * width + k[None, :], mask=in_k, other=0.0)
        values_total += tl.load(partial_values_ptr + cell)
    values = total.to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + row[:, None] * width + k[None, :], values, mask=known[:, None] & in_k)
    if WITH_VALUES and tl.program_id(1) == 0:
        tl.store(result_values_ptr + row, values_total.to(result_values_ptr.dtype.element_ty), mask=known)
