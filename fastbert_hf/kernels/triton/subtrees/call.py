"""The calls: forward and backward by kernels over rows (rows.py) and over nodes (nodes.py)."""

import torch
import triton
from torch import Tensor

from fastbert_hf.fff_reference import ACTIVATION_BACKWARDS, ACTIVATIONS

from .groups import PIECE_ROWS, TILE_ROWS, Groups, table_columns
from .nodes import add_pieces, sum_pieces
from .parts import padded, split_levels
from .rows import lower_paths, path_dots, path_sums, upper_paths

WARPS = 8  # with 4, registers spill


def block_columns(dtype: torch.dtype, *widths: int) -> int:
    """Columns of a product's block: of the dtype and the widths alone, because it fixes the order of summation."""
    return min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(max(widths))))


def node_columns(dtype: torch.dtype, width: int) -> int:
    """Columns of a program of `sum_pieces`: many, because each program finds all paths again."""
    return min(256 if dtype == torch.bfloat16 else 128, max(16, triton.next_power_of_2(width)))


def precision(dtype: torch.dtype, tf32: bool, hip: bool) -> dict[str, str | bool]:
    """How products that do not affect routing are taken, most of which have a float32 factor.

    float32: as three TF32 products, which leave an error like float32's; as one where TF32 is allowed. float16: as
    three, for its range. bfloat16: as two of its own, 16 binary digits of the float32 factor. AMD's matrix units
    (hip) take float32 as it is.
    """
    if dtype == torch.bfloat16:
        return {"ROUNDING": "ieee", "SPLIT": True}
    rounding = "ieee" if hip else "tf32" if tf32 and dtype == torch.float32 else "tf32x3"
    return {"ROUNDING": rounding, "SPLIT": False}


class Subtrees:
    """Forward and backward of one call; tensors are contiguous, N at least 1. No step waits for the device.

    Args:
        x: (N, H). weight_in: (P*n, H). bias_in: (P*n,) or None. weight_out: (P*n, H_out).
        visited: (N, P, D+1) int32. logits: (N, P, D+1) float32. Forward writes them, backward reads them.
        activation: a key of `ACTIVATIONS`.
        tf32: whether float32 products may be rounded to TF32; those that decide never are.
        widen: give products float32 operands; the same sums, for an interpreter that cannot do bfloat16.
    """

    def __init__(
        self,
        x: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        visited: Tensor,
        logits: Tensor,
        activation: str,
        tf32: bool,
        widen: bool,
    ):
        self.x, self.weight_in, self.bias_in, self.weight_out = x, weight_in, bias_in, weight_out
        self.visited, self.logits, self.activation = visited, logits, activation
        self.rows, self.trees, levels = visited.shape
        upper, lower = split_levels(levels - 1)
        self.tree_sizes = {"DEPTH": levels - 1, "UPPER": upper}
        self.group_sizes = {**self.tree_sizes, "LOWER": lower, "GROUPS": table_columns(upper)}
        self.part_sizes = {**self.group_sizes, "UPPER_NODES": padded(upper), "LOWER_NODES": padded(lower)}
        columns = block_columns(x.dtype, x.shape[1], weight_out.shape[1])
        self.tile = {"BLOCK_N": TILE_ROWS, "BLOCK_K": columns, "WIDEN": widen, "num_warps": WARPS}
        self.precision = precision(x.dtype, tf32, hip=torch.version.hip is not None)

    def forward(self, y: Tensor) -> None:
        """Walk every tree for every token.

        Args:
            y: (N, H_out), written; float32 where P > 1.
        """
        bias = y if self.bias_in is None else self.bias_in
        arguments = (self.x, self.weight_in, bias, self.visited, self.logits)
        options = {"HAS_BIAS": self.bias_in is not None, **self.tile}
        width = self.x.shape[1]
        if self.tree_sizes["UPPER"]:
            grid = (triton.cdiv(self.rows, TILE_ROWS), self.trees)
            nodes = self.part_sizes["UPPER_NODES"]
            upper_paths[grid](*arguments, self.rows, width, self.trees, **self.tree_sizes, NODES=nodes, **options)
        groups = [Groups(self.visited, tree) for tree in range(self.trees)]
        for tree in range(self.trees):
            lower_paths[(groups[tree].most_tiles,)](
                *arguments, groups[tree].order, groups[tree].table, tree, width, self.trees,
                **self.group_sizes, NODES=self.part_sizes["LOWER_NODES"], **options,
            )  # fmt: skip
        self._path_sums(ACTIVATIONS[self.activation](self.logits), self.weight_out, y, groups)

    def backward(
        self,
        grad_y: Tensor,
        grad_x: Tensor | None,
        grad_in: Tensor | None,
        grad_bias: Tensor | None,
        grad_out: Tensor | None,
    ) -> None:
        """Gradients, decisions held constant; those that are None are not computed.

        Args:
            grad_y: (N, H_out).
            grad_x: (N, H), written; float32 where P > 1.
            grad_in, grad_bias, grad_out: as the parameters, written; a bias needs grad_in too.
        """
        groups = [Groups(self.visited, tree) for tree in range(self.trees)]
        if grad_x is not None or grad_in is not None:
            grad_activations = torch.empty_like(self.logits)
            for tree in range(self.trees):
                path_dots[(groups[tree].most_tiles,)](
                    grad_y, self.weight_out, grad_activations, self.visited, groups[tree].order, groups[tree].table,
                    tree, grad_y.shape[1], self.trees,
                    **self.part_sizes, ROUNDING=self.precision["ROUNDING"], **self.tile,
                )  # fmt: skip
            grad_logits = ACTIVATION_BACKWARDS[self.activation](grad_activations, self.logits)
        if grad_x is not None:
            self._path_sums(grad_logits, self.weight_in, grad_x, groups)
        if grad_in is not None:
            self._node_sums(grad_logits, self.x, grad_in, grad_bias, groups)
        if grad_out is not None:
            self._node_sums(ACTIVATIONS[self.activation](self.logits), grad_y, grad_out, None, groups)

    def _path_sums(self, values, weight, result, groups: list[Groups]) -> None:
        """result[i] = the sum over token i's paths of its values times the nodes' weights."""
        weight_sum = weight.sum(dtype=torch.float32)
        for tree in range(self.trees):
            path_sums[(groups[tree].most_tiles,)](
                values, weight, weight_sum, result, self.visited, groups[tree].order, groups[tree].table,
                tree, weight.shape[1], self.trees, **self.part_sizes, ADD=tree > 0, **self.precision, **self.tile,
            )  # fmt: skip

    def _node_sums(self, values, vectors, result, result_values, groups: list[Groups]) -> None:
        """result[j] = the sum over node j's tokens of value times vector; result_values[j] = that of the values."""
        width, nodes = vectors.shape[1], max(self.part_sizes["UPPER_NODES"], self.part_sizes["LOWER_NODES"])
        columns = node_columns(vectors.dtype, width)
        partial = values.new_empty(groups[0].most_pieces, nodes, width)
        partial_values = values.new_empty(groups[0].most_pieces, nodes)
        block = self.tile["BLOCK_K"]
        for tree in range(self.trees):
            sum_pieces[(groups[tree].most_pieces, triton.cdiv(width, columns))](
                vectors, values, self.visited, groups[tree].order, groups[tree].table, partial, partial_values,
                tree, width, self.trees, **self.group_sizes, NODES=nodes, PIECE=PIECE_ROWS, **self.precision,
                **{**self.tile, "BLOCK_K": columns},
            )  # fmt: skip
            add_pieces[(groups[tree].in_use, triton.cdiv(width, block))](
                partial, partial_values, groups[tree].table, result,
                result if result_values is None else result_values,
                tree, width, **self.group_sizes, NODES=nodes, WITH_VALUES=result_values is not None, BLOCK_K=block,
            )  # fmt: skip
