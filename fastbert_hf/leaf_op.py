# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""The op of leaf trees: one contract and its registration with PyTorch.

`leaf_trees(x, router, threshold, weight_in, bias_in, weight_out, bias_out, trees, depth, activation)` sends every row
of x down `trees` binary trees of routers. At a router l = <x, router[i]> - threshold[i]; l > 0 goes right, otherwise
(0, -0, NaN) left. After `depth` decisions the row is at a leaf of w neurons, which adds

    c * (activation(x W_in[leaf]^T + b_in[leaf]) W_out[leaf] + b_out[leaf]),   c = sigmoid(min over decisions of |l|)

with c = 1 at depth 0. Gradients hold the decisions constant; c gives the router and threshold of the least certain
decision theirs, the first of equals. Sums are float32 (float64 for float64); decisions and c are never computed in
TF32 or bfloat16. `leaf_reference.py` is that definition in code; a backend is an object like `LeafReferenceBackend`
below that computes exactly the same. The choice of a backend is that of every op (`backends_fastbert.py`).

PyTorch knows the op as `fastbert::leaf_trees_v1`. Source: arXiv 2308.14711 (depth and leaf width); the confidence is
ours.
"""

import torch
from torch import Tensor

from .backends_fastbert import PlainBackend, backend_for, register_backends
from .dispatch_fastbert import TreeOp, is_exporting, refuse_forward_mode, register, runs_directly
from .fff_reference import accumulation_dtype
from .leaf_reference import check_leaf_arguments, leaf_backward, leaf_forward
from .leaf_traceable import leaf_traceable


class LeafReferenceBackend(PlainBackend):
    """`leaf_reference.py`."""

    forward = staticmethod(leaf_forward)
    backward = staticmethod(leaf_backward)


LEAF_BACKENDS = register_backends("leaf_trees", LeafReferenceBackend())


def _fake(x, router, threshold, weight_in, bias_in, weight_out, bias_out, trees, depth, activation):
    parameters = (router, threshold, weight_in, bias_in, weight_out, bias_out)
    width = check_leaf_arguments(x, *parameters, trees, depth, activation)
    rows, dtype = x.shape[0], accumulation_dtype(x.dtype)
    return (
        x.new_empty(rows, weight_out.shape[1]),
        x.new_empty(rows, trees, dtype=torch.int32),
        x.new_empty(rows, trees, dtype=torch.int32),
        x.new_empty(rows, trees, dtype=dtype),
        x.new_empty(rows, trees, width, dtype=dtype),
    )


def _sizes(tensors, saved) -> tuple[int, int]:
    (_, trees, width), neurons = saved[3].shape, tensors[3].shape[0]
    return trees, (neurons // max(1, trees * width)).bit_length() - 1


LEAF_OP = TreeOp(
    family="leaf_trees",
    name="leaf_trees_v1",
    backward_name="leaf_trees_backward_v1",
    tensors=("x", "router", "threshold", "weight_in", "bias_in?", "weight_out", "bias_out?"),
    saved=("leaves", "deciders", "margins", "logits"),
    fake=_fake,
    sizes=_sizes,
)
register(LEAF_OP)


def leaf_trees(
    x: Tensor,
    router: Tensor,
    threshold: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    trees: int,
    depth: int,
    activation: str = "gelu",
) -> Tensor:
    """Leaf trees: every row takes one leaf of every tree; see the module's docstring for the contract.

    Args:
        x: (N, H) float32, bfloat16, float16 or float64; the others have its dtype and device.
        router: (P*r, H), r = 2^D - 1; router i of tree p is row p*r + i. threshold: (P*r,).
        weight_in: (P*m*w, H), m = 2^D; neuron k of leaf j of tree p is row (p*m + j)*w + k.
        bias_in: (P*m*w,) or None. weight_out: (P*m*w, H_out). bias_out: (P*m, H_out) or None.
        trees, depth: P >= 1 and D >= 0. The leaf width w follows from the rows of weight_in.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
    Returns:
        y (N, H_out) in the dtype of x, accumulated in float32 (float64 for float64). Differentiable once.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, or a chosen backend that
            declines.
    """
    parameters = (router, threshold, weight_in, bias_in, weight_out, bias_out)
    if is_exporting():
        check_leaf_arguments(x, *parameters, trees, depth, activation)
        return leaf_traceable(x, *parameters, trees, depth, activation)
    refuse_forward_mode("leaf_trees")
    if runs_directly(x, *parameters):
        backend = backend_for(LEAF_OP.family, x, weight_in, weight_out, trees, depth, activation)
        return backend.infer(x, *parameters, trees, depth, activation)
    return torch.ops.fastbert.leaf_trees_v1(x, *parameters, trees, depth, activation)[0]
