# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""What every op of FastBERT does around its backends: the short way past PyTorch's dispatcher, autocast, limits.

Each op is registered with PyTorch, so that torch.compile, autocast and DDP treat it like any other. Calls that need
none of that machinery go to a backend directly: the dispatcher takes longer than a kernel at N = 1.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

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


def register_autocast(name: str) -> None:
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
