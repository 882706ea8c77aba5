# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""How PyTorch knows an op over trees: registration, gradients, autocast, and the short way past all of it.

Each op is registered with PyTorch, so that torch.compile, autocast and DDP treat it like any other. Calls that need
none of that machinery go to a backend directly: the dispatcher takes longer than a kernel at N = 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .backends_fastbert import BACKENDS, Backend, backend_for, chosen_backend

PLAIN_TYPES = (Tensor, Parameter)  # subclasses may have no storage of their own, or intercept the call
_LIBRARIES: list[torch.library.Library] = []  # a Library's registrations end with it


def is_exporting() -> bool:
    """Whether an exporter traces this call; it should then see ATen operations only."""
    exporting = getattr(torch.compiler, "_is_exporting_flag", None)
    if exporting is None:
        exporting = (
            torch.compiler.is_exporting()
        )  # not asked first: torch.compile of torch 2.9 always has it say True
    return exporting or torch._C._get_tracing_state() is not None


def refuse_forward_mode(op: str) -> None:
    """Raises NotImplementedError inside forward-mode differentiation, which the ops do not have."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"the op {op} has no forward-mode derivative; use reverse mode")


def runs_directly(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a call needs only its result: no gradient, tracing, autocast, mode, or tensor subclass."""
    if (
        torch.compiler.is_compiling()
        or x.device.type == "meta"
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    wants_gradients = torch.is_grad_enabled()
    for tensor in (x, *parameters):
        if tensor is not None and (
            type(tensor) not in PLAIN_TYPES
            or tensor.is_neg()  # a sign that the dispatcher resolves
            or (wants_gradients and tensor.requires_grad)
        ):
            return False
    return True


@dataclass(frozen=True)
class TreeOp:
    """An op over trees: its arguments are tensors, then trees, depth and activation; its first output is y.

    Args:
        family: its name in the registry of backends, "fff". name, backward_name: what PyTorch calls it and its
            backward; the number in them is the contract's version.
        tensors: its tensor arguments in order, x, weight_in and weight_out among them; "?" ends one that may be None.
        saved: its outputs after y; backward needs them, and they have no gradient.
        fake: the arguments -> outputs of the right shapes, without data. It checks the arguments.
        sizes: (tensors, saved) -> trees and depth.
    """

    family: str
    name: str
    backward_name: str
    tensors: tuple[str, ...]
    saved: tuple[str, ...]
    fake: Callable[..., tuple[Tensor, ...]]
    sizes: Callable[[Sequence, Sequence], tuple[int, int]]

    def backend(self, tensors: Sequence, trees: int, depth: int, activation: str, default: str = "") -> Backend:
        """The backend that takes this call, as `backends_fastbert.backend_for`."""
        x, weight_in, weight_out = (tensors[self.tensors.index(n)] for n in ("x", "weight_in", "weight_out"))
        return backend_for(self.family, x, weight_in, weight_out, trees, depth, activation, default=default)

    def schemas(self) -> tuple[str, str]:
        """Those of the op and of its backward, in PyTorch's notation."""
        tensors = ", ".join(f"Tensor{'?' * name.endswith('?')} {name.removesuffix('?')}" for name in self.tensors)
        saved = ", ".join(f"Tensor {name}" for name in self.saved)
        outputs = ", ".join(["Tensor"] * (1 + len(self.saved)))
        choice = 'str backend="", str default=""'
        return (
            f"({tensors}, SymInt trees, SymInt depth, str activation) -> ({outputs})",
            f"(Tensor grad_y, {tensors}, {saved}, str activation, bool[] output_mask, {choice}) -> Tensor[]",
        )


def register(op: TreeOp) -> None:
    """Register an op and its backward with PyTorch once a process.

    A second registration under the same name (this code also travels with models on the Hub) would silently replace
    the first, so whichever copy comes first keeps it.
    """
    if hasattr(torch.ops.fastbert, op.name):
        return
    schema, _ = op.schemas()
    count = len(op.tensors)

    def forward(*arguments) -> tuple[Tensor, ...]:
        *tensors, trees, depth, activation = arguments
        return op.backend(tensors, trees, depth, activation).forward(*arguments)

    registered = torch.library.custom_op(f"fastbert::{op.name}", forward, mutates_args=(), schema=schema)
    registered.register_fake(op.fake)
    backward_op = _register_backward(op)

    def setup_context(ctx, inputs, output):
        *tensors, trees, depth, ctx.activation = inputs
        # Backward may run in a thread of the autograd engine, which has no choice of its own. While a compiler
        # traces, no backend has run yet: then backward gets the choice that holds now as its default.
        is_traced = type(tensors[0]) not in PLAIN_TYPES
        ctx.backend = "" if is_traced else op.backend(tensors, trees, depth, ctx.activation).name
        ctx.default = chosen_backend() or ""
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    def backward(ctx, grad_y, *_):
        output_mask = list(ctx.needs_input_grad[:count])
        call = (grad_y, *ctx.saved_tensors, ctx.activation, output_mask, ctx.backend, ctx.default)
        gradients = iter(backward_op(*call))
        return (*(next(gradients) if wanted else None for wanted in output_mask), None, None, None)

    registered.register_autograd(backward, setup_context=setup_context)
    _register_autocast(op.name)


def _register_backward(op: TreeOp) -> Callable[..., list[Tensor]]:
    """Register an op's backward: it returns the wanted gradients only, in the order of the inputs.

    Its argument `backend` is the name of the one that took forward. Where that is not known, `default` is the choice
    for threads that have none.
    """
    _, schema = op.schemas()
    count = len(op.tensors)

    def split(arguments):
        """Inputs, what forward saved, the rest; PyTorch leaves out arguments that equal their defaults."""
        end = count + len(op.saved)
        return arguments[:count], arguments[count:end], arguments[end:]

    def backward(grad_y, *arguments) -> list[Tensor]:
        tensors, saved, (activation, output_mask, *choice) = split(arguments)
        backend, default = (*choice, "", "")[:2]
        taken = BACKENDS[op.family].get(backend)
        if taken is None:
            taken = op.backend(tensors, *op.sizes(tensors, saved), activation, default)
        gradients = taken.backward(grad_y, *tensors, *saved, activation, output_mask)
        return [gradient for gradient in gradients if gradient is not None]

    registered = torch.library.custom_op(f"fastbert::{op.backward_name}", backward, mutates_args=(), schema=schema)

    @registered.register_fake
    def _(grad_y, *arguments):
        tensors, _, (_, output_mask, *_) = split(arguments)
        return [grad_y.new_empty(t.shape) for t, wanted in zip(tensors, output_mask) if wanted]

    return registered


def register_without_gradient(name: str, schema: str, forward: Callable, fake: Callable) -> None:
    """Register an op for inference, once a process as `register` does: backward through it raises."""
    if hasattr(torch.ops.fastbert, name):
        return
    registered = torch.library.custom_op(f"fastbert::{name}", forward, mutates_args=(), schema=schema)
    registered.register_fake(fake)

    def backward(ctx, *gradients):
        raise NotImplementedError(f"fastbert::{name} has no gradient: it is for inference")

    registered.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)


def _register_autocast(name: str) -> None:
    """Cast every input of the op `fastbert::name` to the dtype of the autocast region it is called in."""
    library = torch.library.Library("fastbert", "FRAGMENT")
    _LIBRARIES.append(library)
    for device_type in ("cpu", "cuda", "xpu"):
        if not torch.amp.is_autocast_available(device_type):
            continue
        key = "Autocast" + torch._C._dispatch_key_for_device(device_type)

        def cast_inputs(_keyset, *args, device_type=device_type, key=key):
            dtype = torch.get_autocast_dtype(device_type)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return getattr(torch.ops.fastbert, name)(
                    *(a.to(dtype) if isinstance(a, Tensor) and a.dtype != torch.float64 else a for a in args)
                )

        library.impl(name, cast_inputs, key, with_keyset=True)
