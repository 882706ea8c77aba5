"""Kernels over tiles of tokens of one group: paths, and products and sums along them.

What a token does not visit is left out. What a row gets depends neither on its tile nor on other rows. Sums are
float32.
"""

import triton
import triton.language as tl

from .groups import TILE_ENDS, chunk_of_group, tokens_between
from .parts import (
    accurate_dot,
    are_finite,
    is_finite,
    last_visited,
    nodes_of_part,
    part_products,
    path_values,
    pick,
)


@triton.jit
def walk_down(
    products,  # (BLOCK_N, NODES)
    bias_in_ptr, visited_ptr, logits_ptr, visit, inside, first, subtree,
    BASE: tl.constexpr, LEVELS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Walk through a part whose products are known; -> the child that each token goes to."""
    node = tl.zeros([products.shape[0]], tl.int64) + subtree + ((1 << BASE) - 1)
    for level in tl.static_range(LEVELS):
        logit = pick(products, node + 1 - (((1 << BASE) + subtree - 1) << level))
        if HAS_BIAS:
            logit += tl.load(bias_in_ptr + first + node, mask=inside, other=0.0).to(tl.float32)
        place = visit + BASE + level
        tl.store(visited_ptr + place, node.to(tl.int32), mask=inside)
        tl.store(logits_ptr + place, logit, mask=inside)
        node = 2 * node + 1 + (logit > 0).to(tl.int64)
    return node


@triton.jit
def upper_paths(
    x_ptr,  # (N, H)
    weight_in_ptr,  # (P*n, H)
    bias_in_ptr,  # (P*n,), or anything without HAS_BIAS
    visited_ptr,  # (N, P, D+1) int32; written as far as level UPPER, the lower part's root
    logits_ptr,  # (N, P, D+1) float32
    rows,  # N
    width,  # H
    trees,  # P
    DEPTH: tl.constexpr,
    UPPER: tl.constexpr,
    NODES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Paths of a tile of tokens through the upper part of one tree."""
    tree = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    first = tree * (2 * (1 << DEPTH) - 1)
    visit = (row * trees + tree) * (DEPTH + 1)
    node, known = nodes_of_part(0, 0, UPPER, NODES)
    products = part_products(x_ptr, weight_in_ptr, row, inside, first, node, known, width, "ieee", WIDEN, BLOCK_K)
    child = walk_down(
        products, bias_in_ptr, visited_ptr, logits_ptr, visit, inside, first, 0, 0, UPPER, HAS_BIAS
    )  # fmt: skip
    tl.store(visited_ptr + visit + UPPER, child.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["tree"])
def lower_paths(
    x_ptr,  # (N, H)
    weight_in_ptr,  # (P*n, H)
    bias_in_ptr,  # (P*n,), or anything without HAS_BIAS
    visited_ptr,  # (N, P, D+1) int32
    logits_ptr,  # (N, P, D+1) float32
    order_ptr,  # (N,) int64: tokens sorted by the lower part that they enter
    table_ptr,  # (4, GROUPS) int64: as `cut_groups` writes it
    tree,
    width,  # H
    trees,  # P
    DEPTH: tl.constexpr,
    UPPER: tl.constexpr,
    LOWER: tl.constexpr,
    NODES: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Paths of a tile of one group's tokens through its lower part."""
    group, start, end = chunk_of_group(table_ptr, TILE_ENDS, GROUPS, BLOCK_N)
    if group < GROUPS:
        row, inside, visit = tokens_between(order_ptr, start, end, tree, trees, DEPTH, BLOCK_N)
        first = tree.to(tl.int64) * (2 * (1 << DEPTH) - 1)
        node, known = nodes_of_part(group, UPPER, LOWER, NODES)
        products = part_products(x_ptr, weight_in_ptr, row, inside, first, node, known, width, "ieee", WIDEN, BLOCK_K)
        walk_down(
            products, bias_in_ptr, visited_ptr, logits_ptr, visit, inside, first, group, UPPER, LOWER, HAS_BIAS
        )  # fmt: skip


@triton.jit
def store_dots(
    vectors_ptr, weight_ptr, visited_ptr, dots_ptr, row, inside, visit, first, subtree, width,
    BASE: tl.constexpr, LEVELS: tl.constexpr, NODES: tl.constexpr, ROUNDING: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products with one part, stored where they are on the path."""
    node, known = nodes_of_part(subtree, BASE, LEVELS, NODES)
    products = part_products(
        vectors_ptr, weight_ptr, row, inside, first, node, known, width, ROUNDING, WIDEN, BLOCK_K
    )
    last = last_visited(visited_ptr, visit, inside, subtree, BASE, LEVELS)
    for level in tl.static_range(LEVELS):
        tl.store(dots_ptr + visit + BASE + level, pick(products, last >> (LEVELS - 1 - level)), mask=inside)


@triton.jit(do_not_specialize=["tree"])
def path_dots(
    vectors_ptr,  # (N, W)
    weight_ptr,  # (P*n, W)
    dots_ptr,  # (N, P, D+1) float32
    visited_ptr,  # (N, P, D+1) int32
    order_ptr,  # as for lower_paths; so is the table
    table_ptr,
    tree,
    width,  # W
    trees,  # P
    DEPTH: tl.constexpr,
    UPPER: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER_NODES: tl.constexpr,
    LOWER_NODES: tl.constexpr,
    GROUPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of a token's vector with the weights of the nodes that it visits, for a tile of one group's tokens.

    Of grad_y and weight_out they are the gradients of the activations.
    """
    group, start, end = chunk_of_group(table_ptr, TILE_ENDS, GROUPS, BLOCK_N)
    if group < GROUPS:
        row, inside, visit = tokens_between(order_ptr, start, end, tree, trees, DEPTH, BLOCK_N)
        first = tree.to(tl.int64) * (2 * (1 << DEPTH) - 1)
        if UPPER > 0:
            store_dots(
                vectors_ptr, weight_ptr, visited_ptr, dots_ptr, row, inside, visit, first, 0, width,
                0, UPPER, UPPER_NODES, ROUNDING, WIDEN, BLOCK_K,
            )  # fmt: skip
        store_dots(
            vectors_ptr, weight_ptr, visited_ptr, dots_ptr, row, inside, visit, first, group, width,
            UPPER, LOWER, LOWER_NODES, ROUNDING, WIDEN, BLOCK_K,
        )  # fmt: skip


@triton.jit
def add_part(
    total,  # (BLOCK_N, BLOCK_K) float32
    path,  # (BLOCK_N, NODES) float32: values at visited nodes, else zero
    weight_ptr, values_ptr, visited_ptr, visit, inside, first, subtree,
    k,  # (BLOCK_K,) columns
    width,
    BASE: tl.constexpr, LEVELS: tl.constexpr, NODES: tl.constexpr, CAREFUL: tl.constexpr,
    ROUNDING: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """total and what one part of the tree adds to it.

    A product takes 0 * Inf to tokens that do not visit the node. CAREFUL leaves the rows of weights that are not
    finite out of the product and adds them to their visitors alone; the others' sums keep their order and bits.
    """
    node, known = nodes_of_part(subtree, BASE, LEVELS, NODES)
    in_k = (k < width)[None, :]
    rows = (first + node)[:, None] * width
    weights = tl.load(weight_ptr + rows + k[None, :], mask=known[:, None] & in_k, other=0.0)
    if CAREFUL:
        good = are_finite(weights)
        weights = tl.where(good[:, None], weights, 0.0)
        path = tl.where(good[None, :], path, 0.0)
        for level in range(LEVELS):
            visited = tl.load(visited_ptr + visit + BASE + level, mask=inside, other=0)
            value = tl.load(values_ptr + visit + BASE + level, mask=inside, other=0.0)
            visited_rows = (first + visited)[:, None] * width
            alone = tl.load(weight_ptr + visited_rows + k[None, :], mask=inside[:, None] & in_k, other=0.0)
            total += tl.where(are_finite(alone)[:, None], 0.0, value[:, None] * alone.to(tl.float32))
    return accurate_dot(path, weights, total, ROUNDING, SPLIT, WIDEN)


@triton.jit
def sum_tile(
    values_ptr, weight_ptr, result_ptr, visited_ptr, row, inside, visit, first, group, width,
    UPPER: tl.constexpr, LOWER: tl.constexpr, UPPER_NODES: tl.constexpr, LOWER_NODES: tl.constexpr,
    ADD: tl.constexpr, CAREFUL: tl.constexpr, ROUNDING: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All columns of a tile of tokens, block by block."""
    if UPPER > 0:
        upper_path = path_values(values_ptr, visited_ptr, visit, inside, 0, 0, UPPER, UPPER_NODES)
    lower_path = path_values(values_ptr, visited_ptr, visit, inside, group, UPPER, LOWER, LOWER_NODES)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        total = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
        if UPPER > 0:
            total = add_part(
                total, upper_path, weight_ptr, values_ptr, visited_ptr, visit, inside, first, 0, k, width,
                0, UPPER, UPPER_NODES, CAREFUL, ROUNDING, SPLIT, WIDEN,
            )  # fmt: skip
        total = add_part(
            total, lower_path, weight_ptr, values_ptr, visited_ptr, visit, inside, first, group, k, width,
            UPPER, LOWER, LOWER_NODES, CAREFUL, ROUNDING, SPLIT, WIDEN,
        )  # fmt: skip
        keep = inside[:, None] & (k < width)[None, :]
        target = result_ptr + row[:, None] * width + k[None, :]
        if ADD:
            total += tl.load(target, mask=keep, other=0.0)
        tl.store(target, total.to(result_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["tree"])
def path_sums(
    values_ptr,  # (N, P, D+1) float32
    weight_ptr,  # (P*n, W)
    weight_sum_ptr,  # () float32: the sum of all weights, which tells whether they are finite
    result_ptr,  # (N, W)
    visited_ptr,  # (N, P, D+1) int32
    order_ptr,  # as for lower_paths; so is the table
    table_ptr,
    tree,
    width,  # W
    trees,  # P
    DEPTH: tl.constexpr,
    UPPER: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER_NODES: tl.constexpr,
    LOWER_NODES: tl.constexpr,
    GROUPS: tl.constexpr,
    ADD: tl.constexpr,  # to what the result holds: trees after the first
    ROUNDING: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum over a token's path of its values times the nodes' weights, for a tile of one group's tokens.

    Of activations and weight_out it is y; of the logits' gradients and weight_in, the gradient of x.
    """
    group, start, end = chunk_of_group(table_ptr, TILE_ENDS, GROUPS, BLOCK_N)
    if group < GROUPS:
        row, inside, visit = tokens_between(order_ptr, start, end, tree, trees, DEPTH, BLOCK_N)
        first = tree.to(tl.int64) * (2 * (1 << DEPTH) - 1)
        if is_finite(tl.load(weight_sum_ptr)):
            sum_tile(
                values_ptr, weight_ptr, result_ptr, visited_ptr, row, inside, visit, first, group, width,
                UPPER, LOWER, UPPER_NODES, LOWER_NODES, ADD, False, ROUNDING, SPLIT, WIDEN, BLOCK_K,
            )  # fmt: skip
        else:
            sum_tile(
                values_ptr, weight_ptr, result_ptr, visited_ptr, row, inside, visit, first, group, width,
                UPPER, LOWER, UPPER_NODES, LOWER_NODES, ADD, True, ROUNDING, SPLIT, WIDEN, BLOCK_K,
            )  # fmt: skip
