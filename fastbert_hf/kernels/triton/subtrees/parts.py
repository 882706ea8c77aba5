"""One part of a tree as a matrix product: its nodes, what a token's path is in it, products and their precision.

A part is a subtree of some levels whose root lies in level `base` and is number `subtree` of that level. Its nodes
are columns, breadth first, padded to NODES, a power of two.
"""

import triton
import triton.language as tl

MAX_LEVELS = 7  # of a part: 127 nodes
LEVEL_COLUMNS = tl.constexpr(8)  # the power of two from there on
INFINITY = tl.constexpr(float("inf"))


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


def padded(levels: int) -> int:
    """Columns of a part's products: its nodes, to the next power of two, as many as tensor cores take at least."""
    return max(16, 1 << levels)


@triton.jit
def depths_of_columns(NODES: tl.constexpr):
    """Levels from the part's root down to each column's node: (NODES,)."""
    column = tl.arange(0, NODES)
    depth = tl.zeros([NODES], tl.int32)
    for level in tl.static_range(1, LEVEL_COLUMNS):
        depth += (column + 1 >= (1 << level)).to(tl.int32)
    return depth


@triton.jit
def nodes_of_part(subtree, base, levels, NODES: tl.constexpr):
    """Number of each column's node in the tree, (NODES,), and whether the column has one."""
    depth, column = depths_of_columns(NODES), tl.arange(0, NODES)
    node = (((1 << base) + subtree) << depth) + column - (1 << depth)
    return node, column < (1 << levels) - 1


@triton.jit
def last_visited(visited_ptr, visit, inside, subtree, base, levels):
    """Where in a part each token's path ends, (BLOCK_N,): the node's number, counted from 1 at the part's root.

    Halving it gives the ancestors. visit: (BLOCK_N,), where the visits of a token to the tree begin.
    """
    node = tl.load(visited_ptr + visit + base + levels - 1, mask=inside, other=0)
    return node + 1 - (((1 << base) + subtree - 1) << (levels - 1))


@triton.jit
def path_values(values_ptr, visited_ptr, visit, inside, subtree, base, levels, NODES: tl.constexpr):
    """A token's values at the nodes of a part that it visits, zero at the others: (BLOCK_N, NODES) float32."""
    level = tl.arange(0, LEVEL_COLUMNS)
    known = inside[:, None] & (level < levels)[None, :]
    values = tl.load(values_ptr + (visit + base)[:, None] + level[None, :], mask=known, other=0.0)
    depth, number = depths_of_columns(NODES), tl.arange(0, NODES) + 1
    spread = tl.gather(values, tl.broadcast_to(depth[None, :], [visit.shape[0], NODES]), axis=1)
    last, up = last_visited(visited_ptr, visit, inside, subtree, base, levels), levels - 1 - depth
    there = (last[:, None] >> tl.maximum(up, 0)[None, :] == number[None, :]) & (up >= 0)[None, :] & inside[:, None]
    return tl.where(there, spread, 0.0)


@triton.jit
def part_products(
    vectors_ptr,  # (N, W)
    weight_ptr,  # (P*n, W)
    row,  # (BLOCK_N,)
    inside,  # (BLOCK_N,)
    first,  # parameter row of the tree's root
    node,  # (NODES,)
    known,  # (NODES,)
    width,  # W
    ROUNDING: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """<vectors[row], weight[first + node]>: (BLOCK_N, NODES) float32."""
    products = tl.zeros([row.shape[0], node.shape[0]], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = (k < width)[None, :]
        vectors = tl.load(vectors_ptr + row[:, None] * width + k[None, :], mask=inside[:, None] & in_k, other=0.0)
        weight_rows = (first + node)[:, None] * width
        weights = tl.load(weight_ptr + weight_rows + k[None, :], mask=known[:, None] & in_k, other=0.0)
        if WIDEN:
            vectors, weights = vectors.to(tl.float32), weights.to(tl.float32)
        products = tl.dot(vectors, tl.trans(weights), products, input_precision=ROUNDING)
    return products


@triton.jit
def pick(products, number):
    """The product with node `number`, counted from 1 at the part's root: (BLOCK_N, NODES), (BLOCK_N,) -> (BLOCK_N,).

    Chosen, not multiplied: whatever other nodes hold stays there.
    """
    mine = (tl.arange(0, products.shape[1]) + 1)[None, :] == number[:, None]
    return tl.sum(tl.where(mine, products, 0.0), axis=1)


@triton.jit
def is_finite(values):
    """Neither NaN nor infinite."""
    return tl.abs(values.to(tl.float32)) < INFINITY


@triton.jit
def are_finite(values):
    """Whether all the numbers of each row are."""
    return tl.min(is_finite(values).to(tl.int32), axis=1) > 0


@triton.jit
def accurate_dot(
    coefficients, vectors, total, ROUNDING: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """total + coefficients @ vectors for float32 coefficients, which the vectors' dtype could not hold.

    SPLIT, for bfloat16 vectors: coefficients as the sum of two bfloat16 numbers, 16 binary digits for two products.
    """
    if SPLIT:
        high = coefficients.to(tl.bfloat16)
        rest = coefficients - high.to(tl.float32)
        low = tl.where(is_finite(rest), rest, 0.0).to(tl.bfloat16)  # infinity less infinity
        if WIDEN:
            high, low, vectors = high.to(tl.float32), low.to(tl.float32), vectors.to(tl.float32)
        result = tl.dot(high, vectors, tl.dot(low, vectors, total, input_precision="ieee"), input_precision="ieee")
    else:
        result = tl.dot(coefficients, vectors.to(tl.float32), total, input_precision=ROUNDING)
    return result
