"""Gradients of the parameters: for each node, the sum over its visits of a coefficient times a vector.

Visits are sorted by node and cut into pieces of CHUNK; each piece is summed by one program, then the pieces of each
node in their order. No atomics: the same inputs give the same bits. Sizes depend on shapes alone, so that nothing
waits for the device and a CUDA graph can capture it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # visits a program sums; the root's N visits are N / CHUNK pieces
ROWS = 16  # of a piece at a time
BLOCK = 128  # columns a program sums


@triton.jit
def sum_chunks(
    coefficients_ptr,  # (visits,) float32
    vectors_ptr,  # (N, W)
    order_ptr,  # (visits,) int64: visits sorted by node
    offsets_ptr,  # (nodes + 1,) int64: where each node's visits begin in the order
    chunk_node_ptr,  # (chunks,) int64: the node of each piece; `nodes` where there is none
    first_chunk_ptr,  # (nodes,) int64
    partial_ptr,  # (chunks, W) float32
    nodes,
    visits_per_row,
    width,  # W
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of one piece, BLOCK columns of it."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    node = tl.load(chunk_node_ptr + chunk)
    if node < nodes:
        begin = tl.load(offsets_ptr + node) + (chunk - tl.load(first_chunk_ptr + node)) * CHUNK
        end = tl.load(offsets_ptr + node + 1)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, CHUNK, ROWS):
            steps = start + tl.arange(0, ROWS)
            there = begin + steps < end
            visits = tl.load(order_ptr + begin + steps, mask=there, other=0)
            coefficients = tl.load(coefficients_ptr + visits, mask=there, other=0.0)
            cells = (visits // visits_per_row)[:, None] * width + columns[None, :]
            vectors = tl.load(vectors_ptr + cells, mask=there[:, None] & inside[None, :], other=0.0)
            total += tl.sum(coefficients[:, None] * vectors.to(tl.float32), axis=0)
        tl.store(partial_ptr + chunk * width + columns, total, mask=inside)


@triton.jit
def sum_nodes(
    partial_ptr,  # (chunks, W) float32
    chunk_node_ptr,  # (chunks,) int64
    first_chunk_ptr,  # (nodes,) int64
    num_chunks_ptr,  # (nodes,) int64
    result_ptr,  # (nodes, W), zero
    nodes,
    width,
    BLOCK: tl.constexpr,
):
    """The program of a node's first piece sums all its pieces, in their order; rows of unvisited nodes stay zero."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    node = tl.load(chunk_node_ptr + chunk)
    if node < nodes:  # noqa: SIM102  `and` would load beyond the nodes
        if tl.load(first_chunk_ptr + node) == chunk:
            total = tl.zeros([BLOCK], tl.float32)
            for piece in range(chunk, chunk + tl.load(num_chunks_ptr + node)):
                total += tl.load(partial_ptr + piece * width + columns, mask=inside, other=0.0)
            tl.store(result_ptr + node * width + columns, total.to(result_ptr.dtype.element_ty), mask=inside)


class Segments:
    """The visits of a call, sorted by node.

    Args:
        visited: (N, P, D+1) int32.
        nodes: nodes of all trees, P*n.
    """

    def __init__(self, visited: Tensor, nodes: int):
        trees, levels = visited.shape[1:]
        device = visited.device
        first_node = torch.arange(trees, device=device).view(1, -1, 1) * (nodes // trees)
        keys, self.order = torch.sort((visited + first_node).flatten(), stable=True)  # (visits,)
        self.nodes, self.visits_per_row = nodes, trees * levels
        self.offsets = torch.searchsorted(keys, torch.arange(nodes + 1, device=device))
        self.num_chunks = (self.offsets.diff() + CHUNK - 1) // CHUNK  # (nodes,)
        ends = self.num_chunks.cumsum(0)
        self.first_chunk = ends - self.num_chunks
        self.most_chunks = triton.cdiv(len(keys), CHUNK) + min(nodes, len(keys))
        self.chunk_node = torch.searchsorted(ends, torch.arange(self.most_chunks, device=device), right=True)

    def sum(self, coefficients: Tensor, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """coefficients (N, P, D+1) float32 times the rows of vectors (N, W): -> (P*n, W) in `dtype`."""
        width = vectors.shape[1]
        result = torch.zeros(self.nodes, width, dtype=dtype, device=vectors.device)
        partial = torch.empty(self.most_chunks, width, dtype=torch.float32, device=vectors.device)
        block = min(BLOCK, max(16, triton.next_power_of_2(width)))
        blocks = triton.cdiv(width, block)
        sum_chunks[(self.most_chunks, blocks)](
            coefficients,
            vectors,
            self.order,
            self.offsets,
            self.chunk_node,
            self.first_chunk,
            partial,
            self.nodes,
            self.visits_per_row,
            width,
            CHUNK=CHUNK,
            ROWS=ROWS,
            BLOCK=block,
        )
        sum_nodes[(self.most_chunks, blocks)](
            partial, self.chunk_node, self.first_chunk, self.num_chunks, result, self.nodes, width, BLOCK=block
        )
        return result
