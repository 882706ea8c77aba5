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

from typing import Protocol

import torch
from torch import Tensor

from .backends_fastbert import backend_for, chosen_backend, register_backends
from .dispatch_fastbert import PLAIN_TYPES, is_exporting, refuse_forward_mode, register_autocast, runs_directly
from .fff_reference import accumulation_dtype
from .leaf_reference import check_leaf_arguments, leaf_backward, leaf_forward, leaf_traceable


class LeafBackend(Protocol):
    """What computes the op. Shapes and dtypes as in `leaf_reference.leaf_forward` and `leaf_backward`."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""

    def supports(self, x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str):
        """Why this backend declines this call (a sentence), or None when it takes it."""

    def infer(self, *args) -> Tensor:
        """y (N, H_out) alone; arguments as `leaf_reference.leaf_forward`."""

    def forward(self, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y, leaves, deciders, margins, logits, as `leaf_reference.leaf_forward`."""

    def backward(self, *args) -> list[Tensor | None]:
        """Seven gradients, as `leaf_reference.leaf_backward`."""


class LeafReferenceBackend:
    """Plain PyTorch: every device, every dtype."""

    name = "reference"
    forward = staticmethod(leaf_forward)
    backward = staticmethod(leaf_backward)

    def unavailable(self) -> None:
        return None

    def supports(self, x, weight_in, weight_out, trees, depth, activation) -> None:
        return None

    def infer(self, *args) -> Tensor:
        return leaf_forward(*args)[0]


LEAF_BACKENDS = register_backends("leaf_trees", LeafReferenceBackend())


def select_leaf_backend(
    x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str, default: str = ""
) -> LeafBackend:
    """The backend that takes this call, as `backends_fastbert.backend_for`."""
    return backend_for("leaf_trees", x, weight_in, weight_out, trees, depth, activation, default=default)


def _register_op() -> None:
    """Register `fastbert::leaf_trees_v1` and its backward once a process; the number is the contract's version."""

    @torch.library.custom_op("fastbert::leaf_trees_v1", mutates_args=())
    def op(
        x: Tensor,
        router: Tensor,
        threshold: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        trees: int,
        depth: int,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        backend = select_leaf_backend(x, weight_in, weight_out, trees, depth, activation)
        return backend.forward(
            x, router, threshold, weight_in, bias_in, weight_out, bias_out, trees, depth, activation
        )

    @op.register_fake
    def _(x, router, threshold, weight_in, bias_in, weight_out, bias_out, trees, depth, activation):
        width = check_leaf_arguments(
            x, router, threshold, weight_in, bias_in, weight_out, bias_out, trees, depth, activation
        )
        rows, dtype = x.shape[0], accumulation_dtype(x.dtype)
        return (
            x.new_empty(rows, weight_out.shape[1]),
            x.new_empty(rows, trees, dtype=torch.int32),
            x.new_empty(rows, trees, dtype=torch.int32),
            x.new_empty(rows, trees, dtype=dtype),
            x.new_empty(rows, trees, width, dtype=dtype),
        )

    backward_op = _register_backward_op()

    def setup_context(ctx, inputs, output):
        *tensors, trees, depth, ctx.activation = inputs
        _, *saved = output
        x, weight_in, weight_out = tensors[0], tensors[3], tensors[5]
        # Backward may run in a thread of the autograd engine, which has no choice of its own. While a compiler
        # traces, no backend has run yet: then backward gets the choice that holds now as its default.
        call = (x, weight_in, weight_out, trees, depth, ctx.activation)
        ctx.backend = "" if type(x) not in PLAIN_TYPES else select_leaf_backend(*call).name
        ctx.default = chosen_backend() or ""
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*tensors, *saved)

    def backward(ctx, grad_y, *_):
        output_mask = list(ctx.needs_input_grad[:7])
        call = (grad_y, *ctx.saved_tensors, ctx.activation, output_mask, ctx.backend, ctx.default)
        gradients = iter(backward_op(*call))
        return (*(next(gradients) if wanted else None for wanted in output_mask), None, None, None)

    op.register_autograd(backward, setup_context=setup_context)
    register_autocast("leaf_trees_v1")


def _register_backward_op():
    """Register `fastbert::leaf_trees_backward_v1`: returns the wanted gradients only, in the order of the inputs.

    `backend` is the name of the one that took forward. Where that is not known, `default` is the choice for threads
    that have none.
    """

    @torch.library.custom_op("fastbert::leaf_trees_backward_v1", mutates_args=())
    def backward_op(
        grad_y: Tensor,
        x: Tensor,
        router: Tensor,
        threshold: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        leaves: Tensor,
        deciders: Tensor,
        margins: Tensor,
        logits: Tensor,
        activation: str,
        output_mask: list[bool],
        backend: str = "",
        default: str = "",
    ) -> list[Tensor]:
        trees, width = logits.shape[1], logits.shape[2]
        depth = (weight_in.shape[0] // max(1, trees * width)).bit_length() - 1
        if backend in LEAF_BACKENDS:
            taken = LEAF_BACKENDS[backend]
        else:
            taken = select_leaf_backend(x, weight_in, weight_out, trees, depth, activation, default)
        parameters = (router, threshold, weight_in, bias_in, weight_out, bias_out)
        gradients = taken.backward(grad_y, x, *parameters, leaves, deciders, margins, logits, activation, output_mask)
        return [gradient for gradient in gradients if gradient is not None]

    @backward_op.register_fake
    def _(grad_y, *args):
        inputs, output_mask = args[:7], args[12]
        return [args[0].new_empty(t.shape) for t, wanted in zip(inputs, output_mask) if wanted]

    return backward_op


if not hasattr(torch.ops.fastbert, "leaf_trees_v1"):
    _register_op()


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
        backend = select_leaf_backend(x, weight_in, weight_out, trees, depth, activation)
        return backend.infer(x, *parameters, trees, depth, activation)
    return torch.ops.fastbert.leaf_trees_v1(x, *parameters, trees, depth, activation)[0]
