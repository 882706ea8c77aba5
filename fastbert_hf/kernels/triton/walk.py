"""Walking the trees, one program a row: gathered parameter rows, every row independent of the others.

Bytes a row, H = H_out, parameters of b bytes: 2 H (D+1) b gathered, 2 H b of x and y. Sums are float32; a program's
order of summation depends on H, H_out, P and D only, so a row's result does not depend on the rows beside it.
"""

import triton
import triton.language as tl

from .activations import activate, activation_gradient


@triton.jit
def walk_forward(
    x_ptr,  # (N, H)
    weight_in_ptr,  # (P*n, H)
    bias_in_ptr,  # (P*n,), or anything without HAS_BIAS
    weight_out_ptr,  # (P*n, H_out)
    y_ptr,  # (N, H_out)
    visited_ptr,  # (N, P, D+1) int32, or anything without SAVE
    logits_ptr,  # (N, P, D+1) float32, likewise
    width,  # H
    out_width,  # H_out
    trees,  # P
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_IN: tl.constexpr,  # the power of two from H on
    BLOCK_OUT: tl.constexpr,  # likewise for H_out
):
    """y of one row and, for backward, its path."""
    row = tl.program_id(0).to(tl.int64)
    columns, out_columns = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    inside, out_inside = columns < width, out_columns < out_width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_OUT], tl.float32)
    for tree in range(trees):
        node = row * 0
        for level in range(DEPTH + 1):
            parameter = tree * (2 * (1 << DEPTH) - 1) + node
            weights = tl.load(weight_in_ptr + parameter * width + columns, mask=inside, other=0.0)
            logit = tl.sum(x * weights.to(tl.float32), axis=0)
            if HAS_BIAS:
                logit += tl.load(bias_in_ptr + parameter).to(tl.float32)
            values = tl.load(weight_out_ptr + parameter * out_width + out_columns, mask=out_inside, other=0.0)
            total += activate(logit, ACTIVATION) * values.to(tl.float32)
            if SAVE:
                visit = (row * trees + tree) * (DEPTH + 1) + level
                tl.store(visited_ptr + visit, node.to(tl.int32))
                tl.store(logits_ptr + visit, logit)
            node = 2 * node + 1 + (logit > 0).to(tl.int64)  # not above zero, NaN included: left
    tl.store(y_ptr + row * out_width + out_columns, total.to(y_ptr.dtype.element_ty), mask=out_inside)


@triton.jit
def walk_backward(
    grad_y_ptr,  # (N, H_out)
    weight_in_ptr,  # (P*n, H)
    weight_out_ptr,  # (P*n, H_out)
    visited_ptr,  # (N, P, D+1) int32
    logits_ptr,  # (N, P, D+1) float32
    grad_x_ptr,  # (N, H), or anything without WANT_X
    grad_logits_ptr,  # (N, P, D+1) float32
    activations_ptr,  # (N, P, D+1) float32
    width,
    out_width,
    trees,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WANT_X: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Gradients of one row's logits and of x; its activations, which the gradient of weight_out needs."""
    row = tl.program_id(0).to(tl.int64)
    columns, out_columns = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    inside, out_inside = columns < width, out_columns < out_width
    grad_y = tl.load(grad_y_ptr + row * out_width + out_columns, mask=out_inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_IN], tl.float32)
    for tree in range(trees):
        for level in range(DEPTH + 1):
            visit = (row * trees + tree) * (DEPTH + 1) + level
            parameter = tree * (2 * (1 << DEPTH) - 1) + tl.load(visited_ptr + visit).to(tl.int64)
            logit = tl.load(logits_ptr + visit)
            values = tl.load(weight_out_ptr + parameter * out_width + out_columns, mask=out_inside, other=0.0)
            grad_logit = activation_gradient(tl.sum(grad_y * values.to(tl.float32), axis=0), logit, ACTIVATION)
            tl.store(grad_logits_ptr + visit, grad_logit)
            tl.store(activations_ptr + visit, activate(logit, ACTIVATION))
            if WANT_X:
                weights = tl.load(weight_in_ptr + parameter * width + columns, mask=inside, other=0.0)
                total += grad_logit * weights.to(tl.float32)
    if WANT_X:
        tl.store(grad_x_ptr + row * width + columns, total.to(grad_x_ptr.dtype.element_ty), mask=inside)
