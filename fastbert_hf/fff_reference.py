# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Fast feedforward trees in plain PyTorch: the definition that every backend is tested against.

Notation: N rows (tokens), H input width, H_out output width, P trees, D depth, n = 2^(D+1) - 1 nodes a tree,
K = P * (D + 1) nodes that one row visits. Nodes are numbered breadth first inside their tree (root 0, children
2i + 1 and 2i + 2); node i of tree p owns row p * n + i of the parameters.

Per level a row needs one dot product with one gathered parameter row; dense (N, P*n) activations never exist.
The gathered rows are bounded by working in chunks; sums over gathered rows use `embedding_bag`, which adds them
without materialising them. Source: arXiv 2311.10770, section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Gathered parameter rows held at once by one chunk on a CPU: 512 rows of 768 float32 values are 1.5 MB, which a
# core's cache holds (measured: 256 to 1024 are equally fast, 4096 is 5 times slower).
GATHERED_ROWS = 512
# Bytes of them on other devices, where each chunk costs launches of kernels that many rows fill: 16384 tokens of 768
# float32 values are 50 MB a level.
GATHERED_BYTES = 256 << 20

MAX_DEPTH = 24  # of a layer's trees: 33 million nodes a tree
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda logits: F.gelu(logits, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# (gradient of the activation, logit) -> gradient of the logit; ATen's own formulas
ACTIVATION_BACKWARDS = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_tanh": lambda grad, logits: torch.ops.aten.gelu_backward(grad, logits, approximate="tanh"),
    "relu": lambda grad, logits: torch.ops.aten.threshold_backward(grad, logits, 0),
    "silu": torch.ops.aten.silu_backward.default,
}


def nodes_per_tree(depth: int) -> int:
    """Number n of nodes of a binary tree of depth `depth`: 2^(depth + 1) - 1."""
    return 2 ** (depth + 1) - 1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_arguments(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    trees: int,
    depth: int,
    activation: str,
) -> None:
    """Check the arguments of the op; every backend does so before it computes.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    dtype, device = x.dtype, x.device
    rows = trees * ((2 << depth) - 1) if depth >= 0 else 0
    if (  # all is well: the rest only finds the words, which would take longer than a kernel at N = 1
        activation in ACTIVATIONS
        and rows > 0
        and x.dim() == 2
        and weight_in.shape == (rows, x.shape[1])
        and weight_out.dim() == 2
        and weight_out.shape[0] == rows
        and dtype in FLOAT_DTYPES
        and weight_in.dtype == dtype
        and weight_out.dtype == dtype
        and weight_in.device == device
        and weight_out.device == device
        and (bias_in is None or (bias_in.shape == (rows,) and bias_in.dtype == dtype and bias_in.device == device))
    ):
        return
    check_call(x, weight_in, weight_out, trees, depth, activation)
    if weight_in.shape[0] != rows or weight_out.shape[0] != rows:
        raise ValueError(
            f"{trees} trees of depth {depth} have {rows} nodes; weight_in has {weight_in.shape[0]} rows and "
            f"weight_out has {weight_out.shape[0]}"
        )
    if weight_in.shape[1] != x.shape[1]:
        raise ValueError(f"x is {x.shape[1]} wide and weight_in {weight_in.shape[1]}; expected equal widths")
    if bias_in is not None and bias_in.shape != (rows,):
        raise ValueError(f"bias_in has shape {tuple(bias_in.shape)}; expected ({rows},)")
    check_types(x, weight_in, bias_in, weight_out)


def check_call(x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str) -> None:
    """Check what the arguments of both forms of tree have in common, apart from dtypes and devices.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if trees < 1 or depth < 0:
        raise ValueError(f"trees is {trees} and depth is {depth}; expected trees >= 1 and depth >= 0")
    if x.dim() != 2 or weight_in.dim() != 2 or weight_out.dim() != 2:
        raise ValueError(
            "x, weight_in and weight_out must be matrices; their shapes are "
            f"{tuple(x.shape)}, {tuple(weight_in.shape)} and {tuple(weight_out.shape)}"
        )


def check_types(*tensors: Tensor | None) -> None:
    """Check that tensors have one dtype, one that the ops compute in, and one device.

    Raises:
        ValueError: names all dtypes or devices.
    """
    tensors = tuple(t for t in tensors if t is not None)
    dtype, device = tensors[0].dtype, tensors[0].device
    if any(t.dtype != dtype for t in tensors) or dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"dtypes are {[str(t.dtype) for t in tensors]}; expected one of "
            f"{', '.join(str(dtype) for dtype in FLOAT_DTYPES)} for all (or torch.autocast)"
        )
    if any(t.device != device for t in tensors):
        raise ValueError(f"devices are {[str(t.device) for t in tensors]}; expected one device for all")


def parameter_rows(nodes: Tensor, depth: int) -> Tensor:
    """Parameter rows of visited nodes: (..., P, L) node numbers inside their tree -> (..., P, L) row numbers."""
    first_row = torch.arange(nodes.shape[-2], device=nodes.device, dtype=nodes.dtype) * nodes_per_tree(depth)
    return nodes + first_row.unsqueeze(-1)


def step_down(nodes: Tensor, logits: Tensor) -> Tensor:
    """Children chosen by the decisions: logit > 0 goes right (2i + 2); 0, -0 and NaN go left (2i + 1)."""
    return 2 * nodes + 1 + (logits > 0).to(nodes.dtype)


def gathered_dots(vectors: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """<vectors[i], weight[rows[i, k]]> for every i and k, in the accumulation dtype.

    Args:
        vectors: (N, W). weight: (R, W). rows: (N, K) integer row numbers of `weight`.
    Returns: (N, K). A product and a sum, not a matrix product: those may run in TF32 or bfloat16.
    """
    dtype = accumulation_dtype(weight.dtype)
    chunk = _chunk_rows(vectors.device, rows.shape[1], weight.shape[1] * dtype.itemsize)
    dots = [
        (weight[r].to(dtype) * v.to(dtype).unsqueeze(1)).sum(-1)  # (c, K, W) -> (c, K)
        for v, r in zip(vectors.split(chunk), rows.split(chunk))
    ]
    return torch.cat(dots)


def _chunk_rows(device: torch.device, rows_per_vector: int, row_bytes: int) -> int:
    """Vectors of one chunk: each gathers `rows_per_vector` parameter rows of `row_bytes`."""
    gathered = GATHERED_ROWS if device.type == "cpu" else GATHERED_BYTES // max(1, row_bytes)
    return max(1, gathered // max(1, rows_per_vector))


def gathered_sum(coefficients: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """sum_k coefficients[i, k] * weight[rows[i, k]]: (N, K), (R, W), (N, K) -> (N, W), accumulation dtype."""
    if rows.numel() == 0:
        return coefficients.new_zeros(rows.shape[0], weight.shape[1])
    if weight.dtype != coefficients.dtype:  # half precision: widen only the rows in use
        used, rows = rows.unique(return_inverse=True)
        weight = weight[used].to(coefficients.dtype)
    return F.embedding_bag(rows, weight, per_sample_weights=coefficients, mode="sum")


def walk(x: Tensor, weight_in: Tensor, bias_in: Tensor | None, trees: int, depth: int) -> tuple[Tensor, Tensor]:
    """The nodes that every row visits in every tree, and their logits: as `fff_forward` returns them."""
    num_rows = x.shape[0]
    visited = x.new_zeros(num_rows, trees, depth + 1, dtype=torch.int32)
    logits = x.new_zeros(num_rows, trees, depth + 1, dtype=accumulation_dtype(x.dtype))
    nodes = visited[..., 0]  # (N, P)
    for level in range(depth + 1):
        rows = parameter_rows(nodes.unsqueeze(-1), depth).squeeze(-1)  # (N, P)
        level_logits = gathered_dots(x, weight_in, rows)
        if bias_in is not None:
            level_logits = level_logits + bias_in[rows]
        visited[..., level] = nodes
        logits[..., level] = level_logits
        nodes = step_down(nodes, level_logits)
    return visited, logits


def fff_forward(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    trees: int,
    depth: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk every tree for every row and sum what the visited nodes contribute.

    Args:
        x: (N, H). weight_in: (P*n, H). bias_in: (P*n,) or None. weight_out: (P*n, H_out). One floating dtype.
        trees, depth: P and D. activation: a key of `ACTIVATIONS`.
    Returns:
        y (N, H_out) in the dtype of x; visited nodes (N, P, D+1) int32; their logits (N, P, D+1) in the
        accumulation dtype.
    Raises:
        ValueError: as `check_arguments`.
    """
    check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
    visited, logits = walk(x, weight_in, bias_in, trees, depth)
    rows = parameter_rows(visited, depth).flatten(1)  # (N, P, D+1) -> (N, K)
    y = gathered_sum(ACTIVATIONS[activation](logits).flatten(1), weight_out, rows)
    return y.to(x.dtype), visited, logits


def fff_backward(
    grad_y: Tensor,
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    visited: Tensor,
    logits: Tensor,
    activation: str,
    output_mask: list[bool],
) -> list[Tensor | None]:
    """Gradients of the walk with its decisions held constant: only visited parameter rows receive any.

    Args:
        grad_y: (N, H_out). visited, logits: (N, P, D+1), as `fff_forward` returned them. The rest as there.
        output_mask: which of the gradients of (x, weight_in, bias_in, weight_out) are wanted.
    Returns: four dense gradients in the shapes and dtypes of the inputs, None where unwanted.
    """
    want_x, want_in, want_bias, want_out = output_mask
    depth = logits.shape[-1] - 1
    rows = parameter_rows(visited, depth).flatten(1)  # (N, K)
    flat_logits = logits.flatten(1)
    grad_x = grad_in = grad_bias = grad_out = None
    by_node = _RowsByNode(rows, weight_in.shape[0]) if want_in or want_out else None
    if want_x or want_in or want_bias:
        grad_logits = ACTIVATION_BACKWARDS[activation](gathered_dots(grad_y, weight_out, rows), flat_logits)  # (N, K)
        if want_x:
            grad_x = gathered_sum(grad_logits, weight_in, rows).to(x.dtype)
        if want_in:
            grad_in = by_node.sum(grad_logits, x).to(weight_in.dtype)
        if want_bias:
            zeros = grad_logits.new_zeros(weight_in.shape[0])
            grad_bias = zeros.index_add_(0, rows.flatten(), grad_logits.flatten()).to(bias_in.dtype)
    if want_out:
        grad_out = by_node.sum(ACTIVATIONS[activation](flat_logits), grad_y).to(weight_out.dtype)
    return [grad_x, grad_in, grad_bias, grad_out]


class _RowsByNode:
    """The transpose of the (row, visited node) incidence, as bags of rows, one bag a parameter row."""

    def __init__(self, rows: Tensor, num_parameter_rows: int):
        flat = rows.flatten()
        self.order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=num_parameter_rows)
        self.offsets = counts.cumsum(0) - counts
        self.visitors = self.order // max(1, rows.shape[1])

    def sum(self, coefficients: Tensor, vectors: Tensor) -> Tensor:
        """sum over the visits (i, k) of each parameter row of coefficients[i, k] * vectors[i]: -> (P*n, W)."""
        if coefficients.numel() == 0:
            return coefficients.new_zeros(self.offsets.shape[0], vectors.shape[1])
        weights = coefficients.flatten()[self.order]
        vectors = vectors.to(coefficients.dtype)
        return F.embedding_bag(self.visitors, vectors, self.offsets, per_sample_weights=weights, mode="sum")


def fff_traceable(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    trees: int,
    depth: int,
    activation: str,
) -> Tensor:
    """The same walk from ATen operations every exporter knows, differentiable, without chunks: -> y (N, H_out).

    Exported programs and ONNX files are made of this, so that they need no package of ours.
    """
    dtype = accumulation_dtype(x.dtype)
    nodes = torch.zeros(x.shape[0], trees, dtype=torch.int64, device=x.device)
    y = torch.zeros(x.shape[0], weight_out.shape[1], dtype=dtype, device=x.device)
    for level in range(depth + 1):
        rows = parameter_rows(nodes.unsqueeze(-1), depth).squeeze(-1)  # (N, P)
        logits = (x.to(dtype).unsqueeze(1) * weight_in[rows].to(dtype)).sum(-1)  # (N, P, H) -> (N, P)
        if bias_in is not None:
            logits = logits + bias_in[rows]
        hidden = ACTIVATIONS[activation](logits)
        y = y + (hidden.unsqueeze(-1) * weight_out[rows].to(dtype)).sum(1)  # (N, P, H_out) -> (N, H_out)
        if level < depth:
            nodes = step_down(nodes, logits)
    return y.to(x.dtype)
