# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""How weights and rows of activations become int8, and the packed layout of the weights of leaves.

The layout is what instructions for products of int8 want: they multiply groups of 4. It is the same on every machine,
so packed weights are what is saved.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS, GROUP_COLUMNS = 16, 4  # of the packed layout
SMALLEST_SCALE = 2.0**-120  # rows whose scale would be smaller count as zeros


# ---- the packed layout ----


def padded_columns(columns: int) -> int:
    """Columns of a packed matrix: whole groups of 4."""
    return -(-columns // GROUP_COLUMNS) * GROUP_COLUMNS


def pack(matrix: Tensor) -> Tensor:
    """Pack matrices: (..., R, K) -> (..., R * padded K).

    Blocks of 16 rows follow one another, the last one narrower where 16 does not divide R. A block of b rows is
    [padded K / 4][b][4]: for every group of 4 columns the values of its first row, then those of its second, and so
    on. Missing columns are zeros.
    """
    *leading, rows, columns = matrix.shape
    matrix = F.pad(matrix, (0, padded_columns(columns) - columns))
    return torch.cat(
        [
            matrix[..., start : start + BLOCK_ROWS, :]
            .unflatten(-1, (-1, GROUP_COLUMNS))  # (..., b, padded K / 4, 4)
            .transpose(-3, -2)
            .reshape(*leading, -1)
            for start in range(0, rows, BLOCK_ROWS)
        ],
        -1,
    )


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The matrices that `pack` packed: (..., R * padded K) -> (..., R, K)."""
    width, whole = padded_columns(columns), rows // BLOCK_ROWS * BLOCK_ROWS
    parts = [part for part in packed.split((whole * width, (rows - whole) * width), -1) if part.shape[-1]]
    matrices = []
    for part in parts:  # the blocks of 16 rows, then the last one
        block = min(BLOCK_ROWS, part.shape[-1] // width)
        groups = part.unflatten(-1, (-1, width // GROUP_COLUMNS, block, GROUP_COLUMNS))
        matrices.append(groups.transpose(-3, -2).flatten(-2).flatten(-3, -2))  # (..., block rows, padded K)
    return (matrices[0] if len(matrices) == 1 else torch.cat(matrices, -2))[..., :columns]


# ---- quantisation ----


def quantize_weights(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise every row of matrices symmetrically.

    Args:
        matrix: (..., R, K) floating.
    Returns:
        q (..., R, K) int8 from -127 to 127; scale (..., R) float32, the largest magnitude of a row / 127. The row is
        scale * q, with an error of at most scale / 2.
    Raises:
        ValueError: a value is not finite.
    """
    if not matrix.isfinite().all():
        raise ValueError("weights to be quantised hold NaN or Inf; expected finite values")
    scale = (matrix.float().abs().amax(-1) / 127).unsqueeze(-1)
    q = torch.where(scale > 0, matrix.float() / scale, 0).round().clamp(-127, 127)
    return q.to(torch.int8), scale.squeeze(-1)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise every row of activations to uint8 with a scale and a zero point.

    Args:
        rows: (N, K) float32.
    Returns:
        q (N, K) float32 integers from 0 to 255; scale (N, 1) float32; zero (N, 1) float32 integers. The row is
        scale * (q - zero), with an error of at most scale. A row with NaN or Inf, or whose range overflows, has the
        scale NaN and no other value that is not finite; one whose scale would be below 2^-120 has the scale 0.
    """
    padded = F.pad(rows, (0, 1))  # 0 is among the values: the zero point is one of the integers
    low, high = padded.amin(-1, keepdim=True), padded.amax(-1, keepdim=True)
    scale = (high - low) / 255
    bad, tiny = ~(scale < torch.inf), scale < SMALLEST_SCALE
    usable = torch.where(bad | tiny, 1.0, scale)
    inverse = 1 / usable
    zero = (-low * inverse).round()
    q = ((rows * inverse).round() + zero).clamp(max=255)
    scale = torch.where(bad, torch.nan, torch.where(tiny, 0.0, scale))
    return torch.where(bad | tiny, 0.0, q), scale, torch.where(bad | tiny, 0.0, zero)
