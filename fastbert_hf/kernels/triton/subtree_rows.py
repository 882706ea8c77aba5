"""Kernels over tiles of tokens: a part of the tree is a matrix product, what a token does not visit is left out.

A part is a subtree of some levels whose root lies in level `base` and is number `subtree` of that level. Its nodes
are columns, breadth first, padded to NODES, a power of two. What a row gets depends neither on its tile nor on other
rows. Sums are float32.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
MOST_LEVELS = tl.constexpr(7)  # of a part
STARTS, ENDS, TILE_ENDS, PIECE_ENDS = (tl.constexpr(row) for row in range(4))  # of the table of groups


@triton.jit
def first_place(sorted_ptr, key, rows, steps):
    """The first of `rows` sorted numbers that is not below each key, by halving `steps` times."""
    low, high = key * 0, key * 0 + rows
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(sorted_ptr + middle, mask=low < high, other=0) < key
        low, high = tl.where((low < high) & below, middle + 1, low), tl.where((low < high) & below, high, middle)
    return low


@triton.jit
def cut_groups(
    entered_ptr,  # (N,) int8, sorted: roots of the lower parts that tokens enter; anything without an upper part
    table_ptr,  # (4, GROUPS) int64
    rows,  # N
    steps,  # 2^steps > N
    UPPER: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The table of groups, for tokens in sorted order.

    Group g holds the tokens that enter lower part g; where there is an upper part, another group holds all, for the
    kernels of subtree_nodes.py; the rest are empty. Rows of the table: where each begins, where it ends, how many
    tiles it and those before it take, how many pieces.
    """
    group = tl.arange(0, GROUPS).to(tl.int64)
    if UPPER > 0:
        root = group + ((1 << UPPER) - 1)
        places = first_place(entered_ptr, root[None, :] + tl.arange(0, 2)[:, None], rows, steps)  # of it and the next
        lower, all_tokens = group < (1 << UPPER), group == (1 << UPPER)
        start = tl.where(lower, tl.min(places, axis=0), 0)
        end = tl.where(lower, tl.max(places, axis=0), tl.where(all_tokens, rows, 0))
    else:
        lower = group == 0
        start, end = group * 0, tl.where(lower, rows, 0).to(tl.int64)
    tiles = tl.where(lower, (end - start + TILE - 1) // TILE, 0)
    tl.store(table_ptr + STARTS * GROUPS + group, start)
    tl.store(table_ptr + ENDS * GROUPS + group, end)
    tl.store(table_ptr + TILE_ENDS * GROUPS + group, tl.cumsum(tiles, axis=0))
    tl.store(table_ptr + PIECE_ENDS * GROUPS + group, tl.cumsum((end - start + PIECE - 1) // PIECE, axis=0))


@triton.jit
def chunk_of_group(table_ptr, CHUNK_ENDS: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's chunk of tokens: its group, first place and the place after its last.

    The programs are as many as groups could need at most; those beyond get the group GROUPS and no place.
    """
    chunk = tl.program_id(0).to(tl.int64)
    chunk_ends_ptr = table_ptr + CHUNK_ENDS * GROUPS
    group = tl.sum((tl.load(chunk_ends_ptr + tl.arange(0, GROUPS)) <= chunk).to(tl.int64), axis=0)
    there = group < GROUPS
    first_chunk = tl.load(chunk_ends_ptr + group - 1, mask=there & (group > 0), other=0)
    start = tl.load(table_ptr + STARTS * GROUPS + group, mask=there, other=0) + (chunk - first_chunk) * CHUNK
    return group, start, tl.minimum(start + CHUNK, tl.load(table_ptr + ENDS * GROUPS + group, mask=there, other=0))


@triton.jit
def depths_of_columns(NODES: tl.constexpr):
    """Levels from the part's root down to each column's node: (NODES,)."""
    column = tl.arange(0, NODES)
    depth = tl.zeros([NODES], tl.int32)
    for level in tl.static_range(1, MOST_LEVELS + 1):
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
    level = tl.arange(0, MOST_LEVELS + 1)
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
        place = start + tl.arange(0, BLOCK_N)
        inside = place < end
        row = tl.load(order_ptr + place, mask=inside, other=0)
        first = tree.to(tl.int64) * (2 * (1 << DEPTH) - 1)
        visit = (row * trees + tree) * (DEPTH + 1)
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
        place = start + tl.arange(0, BLOCK_N)
        inside = place < end
        row = tl.load(order_ptr + place, mask=inside, other=0)
        first = tree.to(tl.int64) * (2 * (1 << DEPTH) - 1)
        visit = (row * trees + tree) * (DEPTH + 1)
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
        place = start + tl.arange(0, BLOCK_N)
        inside = place < end
        row = tl.load(order_ptr + place, mask=inside, other=0)
        first = tree.to(tl.int64) * (2 * (1 << DEPTH) - 1)
        visit = (row * trees + tree) * (DEPTH + 1)
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
