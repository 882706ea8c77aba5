"""Tokens sorted by the lower part of a tree that they enter, and how they are cut into chunks for programs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .parts import split_levels

TILE_ROWS = 64  # tokens of a program over rows
PIECE_ROWS = 512  # tokens whose share of a parameter's gradient one program sums
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
    kernels of nodes.py; the rest are empty. Rows of the table: where each begins, where it ends, how many
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
def tokens_between(order_ptr, start, end, tree, trees, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Up to BLOCK_N tokens from a place on: rows, which of them are there, where their visits to the tree begin."""
    place = start + tl.arange(0, BLOCK_N)
    inside = place < end
    row = tl.load(order_ptr + place, mask=inside, other=0)
    return row, inside, (row * trees + tree) * (DEPTH + 1)


def table_columns(upper: int) -> int:
    """Columns of the table of groups: the lower parts and, where there is an upper one, a group of all tokens."""
    return 2 << upper if upper else 1


class Groups:
    """The tokens of a call, sorted by the lower part of one tree that they enter.

    Args:
        visited: (N, P, D+1) int32, known as far as the root of the lower part. tree: 0 to P-1.

    Attributes:
        order: (N,) int64. table: (4, G) int64, as `cut_groups` writes it.
        most_tiles, most_pieces: how many there can be, the last of each group being partly empty; the device knows
            how many there are.
        in_use: groups that may hold tokens.
    """

    def __init__(self, visited: Tensor, tree: int):
        rows, _, levels = visited.shape
        upper, _ = split_levels(levels - 1)
        if upper:
            entered = visited[:, tree, upper].to(torch.int8)  # 126 at most; a radix sort passes once for each byte
            entered, self.order = torch.sort(entered, stable=True)
        else:
            entered, self.order = visited, torch.arange(rows, device=visited.device)
        self.table = visited.new_empty(4, table_columns(upper), dtype=torch.int64)
        cut_groups[(1,)](
            entered, self.table, rows, rows.bit_length(),
            UPPER=upper, GROUPS=table_columns(upper), TILE=TILE_ROWS, PIECE=PIECE_ROWS,
        )  # fmt: skip
        self.most_tiles = triton.cdiv(rows, TILE_ROWS) + (1 << upper) - 1
        self.most_pieces = triton.cdiv(rows, PIECE_ROWS) * (2 if upper else 1) + (1 << upper) - 1
        self.in_use = (1 << upper) + (upper > 0)
