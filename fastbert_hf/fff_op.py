# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""The FFF op: one contract, several backends, and the choice between them.

`fff(x, weight_in, bias_in, weight_out, trees, depth, activation)` walks `trees` binary trees of depth `depth` for
every row of x and returns the sum of what the visited nodes contribute. At node i the logit is
<x, weight_in[i]> + bias_in[i]; logit > 0 goes right, otherwise (0, -0, NaN) left; all depth + 1 visited nodes,
the leaf included, add activation(logit) * weight_out[i]. Gradients hold the decisions constant: only visited
parameter rows receive any. `fff_reference.py` is that definition in code; a backend is an object like
`ReferenceBackend` below that computes exactly the same. Source: arXiv 2311.10770.

The op is registered with PyTorch as `fastbert::fff_v1`, so that torch.compile, autocast and DDP treat it like any
other. Calls that need none of that machinery go to the backend directly: the dispatcher takes longer than a kernel
at N = 1.
"""

import torch
from torch import Tensor

from .backends_fastbert import (
    BACKEND_VARIABLE,
    Backend,
    PlainBackend,
    backend_for,
    register_backends,
    use_backend,
)
from .dispatch_fastbert import TreeOp, is_exporting, refuse_forward_mode, register, runs_directly
from .fff_reference import (
    accumulation_dtype,
    check_arguments,
    fff_backward,
    fff_forward,
    fff_traceable,
)

__all__ = ["BACKENDS", "BACKEND_VARIABLE", "Backend", "ReferenceBackend", "fff", "select_backend", "use_backend"]


class ReferenceBackend(PlainBackend):
    """`fff_reference.py`."""

    forward = staticmethod(fff_forward)
    backward = staticmethod(fff_backward)


BACKENDS = register_backends("fff", ReferenceBackend())


def _fake(x, weight_in, bias_in, weight_out, trees, depth, activation):
    check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
    paths = (x.shape[0], trees, depth + 1)
    return (
        x.new_empty(x.shape[0], weight_out.shape[1]),
        x.new_empty(paths, dtype=torch.int32),
        x.new_empty(paths, dtype=accumulation_dtype(x.dtype)),
    )


def _sizes(_tensors, saved) -> tuple[int, int]:
    _, trees, levels = saved[1].shape
    return trees, levels - 1


OP = TreeOp(
    family="fff",
    name="fff_v1",
    backward_name="fff_backward_v1",
    tensors=("x", "weight_in", "bias_in?", "weight_out"),
    saved=("visited", "logits"),
    fake=_fake,
    sizes=_sizes,
)
register(OP)


def select_backend(
    x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str, default: str = ""
) -> Backend:
    """The backend that takes this call: the chosen one, otherwise the first that supports it.

    Raises:
        ValueError: the chosen backend is unknown or declines; the message gives its reason.
    """
    return backend_for(OP.family, x, weight_in, weight_out, trees, depth, activation, default=default)


def fff(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    trees: int,
    depth: int,
    activation: str = "gelu",
) -> Tensor:
    """Fast feedforward: walk every tree for every row; see the module's docstring for the contract.

    Args:
        x: (N, H) float32, bfloat16, float16 or float64.
        weight_in: (P*n, H), bias_in: (P*n,) or None, weight_out: (P*n, H_out); dtype and device of x.
            n = 2^(D+1) - 1; node i of tree p is row p*n + i.
        trees, depth: P >= 1 and D >= 0.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
    Returns:
        y (N, H_out) in the dtype of x, accumulated in float32 (float64 for float64). Differentiable once.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, or a chosen backend that
            declines.
    """
    if is_exporting():
        check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
        return fff_traceable(x, weight_in, bias_in, weight_out, trees, depth, activation)
    refuse_forward_mode("fff")
    if runs_directly(x, weight_in, bias_in, weight_out):
        backend = select_backend(x, weight_in, weight_out, trees, depth, activation)
        return backend.infer(x, weight_in, bias_in, weight_out, trees, depth, activation)
    return torch.ops.fastbert.fff_v1(x, weight_in, bias_in, weight_out, trees, depth, activation)[0]
