# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""The backends of every op, and the choice between them.

An op registers its backends under its name, in order of preference: the first that supports a call takes it, unless
one is chosen. The choice is one name for all ops: that of `use_backend` in this thread or task, otherwise the
environment variable FASTBERT_BACKEND, otherwise "auto".

This file travels with models on the Hub, so several copies of it can live in one process. Each copy has a registry of
its own; the choice is kept where all of them find it.
"""

import os
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

BACKEND_VARIABLE = "FASTBERT_BACKEND"
AUTO = "auto"


class Backend(Protocol):
    """What computes an op. Arguments, shapes and dtypes are those of the functions in the op's reference file.

    `supports` sees arguments as they come; `infer` and `forward` check them as the reference does.
    """

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""

    def supports(self, x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str):
        """Why this backend declines this call (a sentence), or None when it takes it."""

    def infer(self, *arguments) -> Tensor:
        """y (N, H_out) alone."""

    def forward(self, *arguments) -> tuple[Tensor, ...]:
        """y (N, H_out) and what backward needs."""

    def backward(self, grad_y: Tensor, *arguments) -> list[Tensor | None]:
        """Gradients of the tensor arguments; None where `output_mask`, the last argument, does not ask for one."""


class PlainBackend:
    """Plain PyTorch, every device and dtype: a subclass names the reference's `forward` and `backward`."""

    name = "reference"

    def unavailable(self) -> None:
        return None

    def supports(self, *call) -> None:
        return None

    def infer(self, *arguments) -> Tensor:
        return self.forward(*arguments)[0]


BACKENDS: dict[str, dict[str, Backend]] = {}  # op -> name -> backend, in order of preference

# The name that `use_backend` chose in this context, or None. It is kept in the namespace of the ops, which a process
# has once; `setdefault` lets one copy of this file win even where several threads import them.
_CHOICE: ContextVar[str | None] = vars(torch.ops.fastbert).setdefault(
    "backend_choice_v1", ContextVar("fastbert_backend_choice", default=None)
)


def register_backends(op: str, *backends: Backend) -> dict[str, Backend]:
    """Register the backends of an op: those of the installed package first, then `backends`.

    Args:
        op: name of the op, as `fastbert_hf.kernels.BACKENDS_BY_OP` uses it.
        backends: what the op's own file brings, in order of preference. The last one should support every call.
    Returns: the op's entry of `BACKENDS`.
    """
    BACKENDS[op] = {backend.name: backend for backend in (*_kernel_backends(op), *backends)}
    return BACKENDS[op]


def _kernel_backends(op: str) -> Iterable[Backend]:
    """Kernels are part of the installed package only: code loaded from the Hub runs without them."""
    try:
        from fastbert_hf import kernels
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "fastbert_hf":
            raise
        return ()
    return getattr(kernels, "BACKENDS_BY_OP", {}).get(op, ())  # an older package has no such table


class use_backend:
    """Choose the backend of every op, as a call or for the length of a `with` block.

    The choice holds in the thread or asyncio task that makes it, as that of `torch.set_grad_enabled` does; other
    threads keep theirs. The environment variable FASTBERT_BACKEND is the default of all threads and of the worker
    processes that they start. Neither is stored in a configuration. A chosen backend that cannot take a call raises a
    ValueError that says why. Backward takes the backend that forward took, whatever is chosen then.

    Args:
        name: a name in `BACKENDS`, or "auto" for the first backend that supports a call.
    Raises:
        ValueError: unknown name, or a backend that is not available on this machine.
    """

    def __init__(self, name: str):
        _check_available(name)
        self.name = name
        self._before = [_CHOICE.get()]  # what stood before each block that is entered; the call counts as the first
        self._entered = False
        _CHOICE.set(name)

    def __enter__(self):
        if self._entered or not self._before:  # a second time
            self._before.append(_CHOICE.get())
            _CHOICE.set(self.name)
        self._entered = True
        return self

    def __exit__(self, *exc_info):
        _CHOICE.set(self._before.pop())
        self._entered = bool(self._before)


def _check_available(name: str) -> None:
    if name == AUTO:
        return
    same_name = [backends[name] for backends in BACKENDS.values() if name in backends]
    if not same_name:
        known = dict.fromkeys(known for backends in BACKENDS.values() for known in backends)
        raise ValueError(f"unknown backend {name!r}; known: {', '.join((AUTO, *known))}")
    reasons = [backend.unavailable() for backend in same_name]
    if None not in reasons:
        raise ValueError(f"backend {name!r} is not available: {reasons[0]}")


def chosen_backend() -> str | None:
    """The name that `use_backend` chose in this thread or task, or None."""
    return _CHOICE.get()


def backend_for(op: str, *call, default: str = "") -> Backend:
    """The backend that takes this call: the chosen one, otherwise the first that supports it.

    Args:
        op: name of the op. call: what `Backend.supports` of its backends takes.
        default: a name to take instead of that in the environment where this thread has chosen none.
    Raises:
        ValueError: the chosen backend is unknown to the op or declines; the message gives its reason.
    """
    backends = BACKENDS[op]
    chosen = _CHOICE.get() or default or os.environ.get(BACKEND_VARIABLE) or AUTO
    if chosen == AUTO:
        for backend in backends.values():
            if backend.supports(*call) is None:
                return backend
        raise AssertionError(f"no backend of {op} supports this call; its reference should support every call")
    backend = backends.get(chosen)
    if backend is None:
        raise ValueError(f"unknown backend {chosen!r} of the op {op}; known: {', '.join((AUTO, *backends))}")
    reason = backend.unavailable() or backend.supports(*call)
    if reason is not None:
        raise ValueError(f"backend {chosen!r} cannot take this call of the op {op}: {reason}")
    return backend
