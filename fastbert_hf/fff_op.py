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

from typing import Protocol

import torch
from torch import Tensor

from .backends_fastbert import BACKEND_VARIABLE, backend_for, chosen_backend, register_backends, use_backend
from .dispatch_fastbert import PLAIN_TYPES, is_exporting, refuse_forward_mode, register_autocast, runs_directly
from .fff_reference import (
    accumulation_dtype,
    check_arguments,
    fff_backward,
    fff_forward,
    fff_traceable,
)

__all__ = ["BACKENDS", "BACKEND_VARIABLE", "Backend", "ReferenceBackend", "fff", "select_backend", "use_backend"]


class Backend(Protocol):
    """What computes the op. Shapes and dtypes as in `fff_reference.fff_forward` and `fff_backward`.

    `supports` sees arguments as they come; `infer` and `forward` check them with `fff_reference.check_arguments`.
    """

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""

    def supports(self, x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str):
        """Why this backend declines this call (a sentence), or None when it takes it."""

    def infer(self, x, weight_in, bias_in, weight_out, trees, depth, activation) -> Tensor:
        """y (N, H_out) alone."""

    def forward(self, x, weight_in, bias_in, weight_out, trees, depth, activation) -> tuple[Tensor, Tensor, Tensor]:
        """y (N, H_out), visited nodes (N, P, D+1) int32, logits (N, P, D+1)."""

    def backward(
        self, grad_y, x, weight_in, bias_in, weight_out, visited, logits, activation, output_mask
    ) -> list[Tensor | None]:
        """Gradients of x, weight_in, bias_in, weight_out; None where `output_mask` does not ask for one."""


class ReferenceBackend:
    """Plain PyTorch: every device, every dtype."""

    name = "reference"
    forward = staticmethod(fff_forward)
    backward = staticmethod(fff_backward)

    def unavailable(self) -> None:
        return None

    def supports(self, x, weight_in, weight_out, trees, depth, activation) -> None:
        return None

    def infer(self, *args) -> Tensor:
        return fff_forward(*args)[0]


BACKENDS = register_backends("fff", ReferenceBackend())


def select_backend(
    x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str, default: str = ""
) -> Backend:
    """The backend that takes this call: the chosen one, otherwise the first that supports it.

    Raises:
        ValueError: the chosen backend is unknown or declines; the message gives its reason.
    """
    return backend_for("fff", x, weight_in, weight_out, trees, depth, activation, default=default)


def _register_op() -> None:
    """Register `fastbert::fff_v1` and its backward once a process.

    A second registration under the same name (this file also travels with models on the Hub) would silently replace
    the first, so whichever copy of this file comes first keeps it. The number is the contract's version.
    """

    @torch.library.custom_op("fastbert::fff_v1", mutates_args=())
    def op(
        x: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        trees: int,
        depth: int,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        backend = select_backend(x, weight_in, weight_out, trees, depth, activation)
        return backend.forward(x, weight_in, bias_in, weight_out, trees, depth, activation)

    @op.register_fake
    def _(x, weight_in, bias_in, weight_out, trees, depth, activation):
        check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
        paths = (x.shape[0], trees, depth + 1)
        return (
            x.new_empty(x.shape[0], weight_out.shape[1]),
            x.new_empty(paths, dtype=torch.int32),
            x.new_empty(paths, dtype=accumulation_dtype(x.dtype)),
        )

    backward_op = _register_backward_op()

    def setup_context(ctx, inputs, output):
        x, weight_in, bias_in, weight_out, trees, depth, ctx.activation = inputs
        _, visited, logits = output
        # Backward may run in a thread of the autograd engine, which has no choice of its own. While a compiler
        # traces, no backend has run yet: then backward gets the choice that holds now as its default.
        is_traced = type(x) not in PLAIN_TYPES
        ctx.backend = "" if is_traced else select_backend(x, weight_in, weight_out, trees, depth, ctx.activation).name
        ctx.default = chosen_backend() or ""
        ctx.mark_non_differentiable(visited, logits)
        ctx.save_for_backward(x, weight_in, bias_in, weight_out, visited, logits)

    def backward(ctx, grad_y, _grad_visited, _grad_logits):
        output_mask = list(ctx.needs_input_grad[:4])
        call = (grad_y, *ctx.saved_tensors, ctx.activation, output_mask, ctx.backend, ctx.default)
        gradients = iter(backward_op(*call))
        return (*(next(gradients) if wanted else None for wanted in output_mask), None, None, None)

    op.register_autograd(backward, setup_context=setup_context)
    register_autocast("fff_v1")


def _register_backward_op():
    """Register `fastbert::fff_backward_v1`: returns the wanted gradients only, in the order of the inputs.

    `backend` is the name of the one that took forward. Where that is not known, `default` is the choice for threads
    that have none.
    """

    @torch.library.custom_op("fastbert::fff_backward_v1", mutates_args=())
    def backward_op(
        grad_y: Tensor,
        x: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        visited: Tensor,
        logits: Tensor,
        activation: str,
        output_mask: list[bool],
        backend: str = "",
        default: str = "",
    ) -> list[Tensor]:
        trees, depth = logits.shape[1], logits.shape[2] - 1
        if backend in BACKENDS:
            taken = BACKENDS[backend]
        else:
            taken = select_backend(x, weight_in, weight_out, trees, depth, activation, default)
        gradients = taken.backward(
            grad_y, x, weight_in, bias_in, weight_out, visited, logits, activation, output_mask
        )
        return [gradient for gradient in gradients if gradient is not None]

    @backward_op.register_fake
    def _(grad_y, x, weight_in, bias_in, weight_out, visited, logits, activation, output_mask, *_):
        inputs = (x, weight_in, bias_in, weight_out)
        return [x.new_empty(t.shape) for t, wanted in zip(inputs, output_mask) if wanted]

    return backward_op


if not hasattr(torch.ops.fastbert, "fff_v1"):
    _register_op()


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
