"""What the `native` backends of all ops share: when they run, and calls of the library with buffers around them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import describe, load_library, packed, why_unavailable

ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
STATUS_NO_MEMORY, STATUS_BAD_PATH, STATUS_NO_DATA = 1, 2, 4


class NativeFunctions:
    """C++ kernels for CPUs: float32 and bfloat16, accumulated in float32.

    Results are the same bit for bit whatever the number of threads, and a row's result does not depend on the other
    rows of the call. They differ in the last bits between instruction sets.

    A subclass names the functions of the library: `forward_symbol`, `backward_symbol`; None for an op without a
    gradient.
    """

    name = "native"
    forward_symbol: str
    backward_symbol: str | None = None
    typed = 0  # the tensor whose dtype `run` hands over

    def __init__(self):
        self._forward = self._backward = None

    def unavailable(self) -> str | None:
        reason = why_unavailable()
        if reason is None and self._forward is None:
            self._load()
        return reason

    def describe(self) -> str:
        """What runs on this machine, where it is available."""
        return describe()

    def _load(self) -> None:
        library = load_library()
        forward = getattr(library, f"{self.forward_symbol}_packed")
        self._forward = packed(forward, getattr(library, self.forward_symbol).argtypes)
        if self.backward_symbol is not None:
            self._backward = getattr(library, self.backward_symbol)

    def supports(self, x: Tensor, *call) -> str | None:
        if self._forward is None:
            reason = self.unavailable()
            if reason is not None:
                return reason
        if x.dtype not in DTYPE_CODES:
            return f"it computes float32 and bfloat16, not {x.dtype}"
        if not x.is_cpu:
            return f"it runs on the CPU, not on {x.device}"
        if x.layout is not torch.strided:
            return f"x has layout {x.layout}"
        return None

    def run(self, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
        """One call of the forward function.

        Args:
            tensors: x first and the output last, checked. sizes: what follows the pointers, up to the dtype.
        """
        if self._forward is None:
            self._load()
        # contiguous() returns the tensor itself where it can; the list keeps copies alive during the call
        tensors = [t if t is None else t.contiguous() for t in tensors]
        self._call(self._forward, tensors, *sizes, DTYPE_CODES[tensors[self.typed].dtype])

    def _call(self, function, tensors: Sequence[Tensor | None], *words: int) -> None:
        """One call of the library: its tensors in order, all that follows them, and the number of threads."""
        status = function(*[0 if t is None else t.data_ptr() for t in tensors], *words, torch.get_num_threads())
        if status:
            self._raise_status(status)

    def _raise_status(self, status: int) -> None:
        if status == STATUS_NO_MEMORY:
            raise MemoryError("the native kernels could not allocate scratch memory")
        if status == STATUS_NO_DATA:
            raise ValueError(
                "a tensor has no memory of its own (torch._efficientzerotensor); expected one that has: clone it"
            )
        raise AssertionError(f"the native kernels refused their arguments (status {status})")


class NativeKernels(NativeFunctions):
    """Those of an op over trees.

    A subclass also names the deepest tree they take (`max_depth`) and what they call the paths they are given
    (`paths`).
    """

    max_depth: int
    paths: str
    max_backward_rows = 2**31 - 1  # row numbers are int32; forward counts them in each of its chunks

    def supports(
        self, x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str
    ) -> str | None:
        reason = super().supports(x)
        if reason is not None:
            return reason
        if not (weight_in.is_cpu and weight_out.is_cpu):
            return f"it runs on the CPU, not on {weight_in.device}"
        return None if depth <= self.max_depth else f"depth is {depth}; at most {self.max_depth}"

    def run_forward(
        self, tensors: Sequence[Tensor | None], out_width: int, saved: Sequence[Tensor], sizes: tuple, activation: str
    ) -> Tensor:
        """y (N, H_out). At one row this takes longer than the kernel: every line counts.

        Args:
            tensors: the op's tensor arguments, x first, checked.
            saved: what backward needs, to be filled in; None where it is not wanted.
            sizes: P and what follows it in the library's function, up to the depth.
        """
        if self._forward is None:
            self._load()
        x = tensors[0]
        y = x.new_empty((x.shape[0], out_width))
        if x.shape[0] == 0:
            return y
        # contiguous() returns the tensor itself where it can; the list keeps copies alive during the call
        tensors = [t if t is None else t.contiguous() for t in tensors]
        self._call(self._forward, (*tensors, y, *saved), *self._words(x, out_width, sizes, activation))
        return y

    def run_backward(
        self,
        sources: Sequence[Tensor | None],
        inputs: Sequence[Tensor | None],
        out_width: int,
        sizes: tuple,
        activation: str,
        output_mask: Sequence[bool],
    ) -> list[Tensor | None]:
        """The wanted gradients of `inputs`, x first.

        Args:
            sources: what the library's function reads, in its order, checked. sizes: as for `run_forward`.
        """
        if self._backward is None:
            self._load()
        x = inputs[0]
        num_rows = x.shape[0]
        allocate = torch.empty if num_rows else torch.zeros
        gradients = [
            allocate(t.shape, dtype=t.dtype) if wanted and t is not None else None
            for t, wanted in zip(inputs, output_mask)
        ]
        if num_rows == 0:
            return gradients
        sources = [t if t is None else t.contiguous() for t in sources]
        self._call(self._backward, (*sources, *gradients), *self._words(x, out_width, sizes, activation))
        return gradients

    def _words(self, x: Tensor, out_width: int, sizes: tuple, activation: str) -> tuple[int, ...]:
        """What follows the tensors in a call."""
        return (*x.shape, out_width, *sizes, ACTIVATION_CODES[activation], DTYPE_CODES[x.dtype])

    def backward_in_chunks(
        self, grad_y: Tensor, inputs: Sequence, saved: Sequence[Tensor], activation: str, output_mask: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of more rows than one call of the library numbers; those of parameters are summed in float32."""
        x, *parameters = inputs
        grads_x, totals = [], [None] * len(parameters)
        for some_grad_y, some_x, *some_saved in zip(*(t.split(self.max_backward_rows) for t in (grad_y, x, *saved))):
            call = (some_grad_y, some_x, *parameters, *some_saved, activation, output_mask)
            grad_x, *gradients = self.backward(*call)
            grads_x.append(grad_x)
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    totals[i] = gradient.float() if totals[i] is None else totals[i].add_(gradient)
        return [
            torch.cat(grads_x) if output_mask[0] else None,
            *(None if total is None else total.to(x.dtype) for total in totals),
        ]

    def _raise_status(self, status: int) -> None:
        if status == STATUS_BAD_PATH:
            raise ValueError(f"{self.paths} from the root to a leaf, as the op's forward returns them")
        super()._raise_status(status)


def check_saved(
    grad_y: Tensor, x: Tensor, weight_out: Tensor, saved: dict[str, tuple[Tensor, str, torch.dtype]]
) -> None:
    """Check what backward is given beside the op's own arguments.

    Args:
        saved: name -> tensor, its sizes after N in words ("trees, w"), its dtype; the last one sets the sizes.
    Raises:
        ValueError: names the tensor, what it is and what was expected.
    """
    num_rows = x.shape[0]
    if grad_y.shape != (num_rows, weight_out.shape[1]) or grad_y.dtype != x.dtype or not grad_y.is_cpu:
        raise ValueError(
            f"grad_y is {tuple(grad_y.shape)} {grad_y.dtype} {grad_y.device}; expected "
            f"({num_rows}, {weight_out.shape[1]}) {x.dtype} cpu"
        )
    sizes = next(reversed(saved.values()))[0].shape
    for name, (tensor, words, dtype) in saved.items():
        dims = 2 + words.count(",")
        if tensor.dim() != dims or tensor.shape != (num_rows, *sizes[1:dims]):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; expected ({num_rows}, {words})")
        if tensor.dtype != dtype or not tensor.is_cpu:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected {dtype} on the CPU")
