"""The `native` backend of the FFF op: checks and buffers around the compiled kernels."""

import torch
from torch import Tensor

from fastbert_hf.fff_reference import check_arguments

from .library import describe, load_library, why_unavailable

ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
MAX_DEPTH = 30  # node numbers are int32
MAX_BACKWARD_ROWS = 2**31 - 1  # so are row numbers, which forward counts in each of its chunks
STATUS_NO_MEMORY, STATUS_BAD_PATH, STATUS_NO_DATA = 1, 2, 4


class NativeBackend:
    """C++ kernels for CPUs: float32 and bfloat16, accumulated in float32.

    Results are the same bit for bit whatever the number of threads, and a row's result does not depend on the other
    rows of the call. They differ in the last bits between instruction sets.
    """

    name = "native"
    max_depth = MAX_DEPTH

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
        self._backward, self._forward = library.fff_backward, library.fff_forward

    def supports(
        self, x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str
    ) -> str | None:
        if self._forward is None:
            reason = self.unavailable()
            if reason is not None:
                return reason
        if x.dtype not in DTYPE_CODES:
            return f"it computes float32 and bfloat16, not {x.dtype}"
        if not (x.is_cpu and weight_in.is_cpu and weight_out.is_cpu):
            return f"it runs on the CPU, not on {x.device}"
        if depth > self.max_depth:
            return f"depth is {depth}; at most {self.max_depth}"
        if x.layout is not torch.strided:
            return f"x has layout {x.layout}"
        return None

    def infer(self, x, weight_in, bias_in, weight_out, trees, depth, activation) -> Tensor:
        check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
        return self._run(x, weight_in, bias_in, weight_out, trees, depth, activation, None, None)

    def forward(self, x, weight_in, bias_in, weight_out, trees, depth, activation):
        check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
        paths = (x.shape[0], trees, depth + 1)
        visited, logits = x.new_empty(paths, dtype=torch.int32), x.new_empty(paths, dtype=torch.float32)
        y = self._run(
            x, weight_in, bias_in, weight_out, trees, depth, activation, visited.data_ptr(), logits.data_ptr()
        )
        return y, visited, logits

    def _run(self, x, weight_in, bias_in, weight_out, trees, depth, activation, visited, logits) -> Tensor:
        """At one row this function takes longer than the kernel: every line counts, and none may be superfluous."""
        if self._forward is None:
            self._load()
        num_rows, in_width = x.shape
        out_width = weight_out.shape[1]
        y = x.new_empty((num_rows, out_width))
        if num_rows == 0:
            return y
        # contiguous() returns the tensor itself where it can; the names keep copies alive during the call
        x, weight_in, weight_out = x.contiguous(), weight_in.contiguous(), weight_out.contiguous()
        bias = None
        if bias_in is not None:
            bias_in = bias_in.contiguous()
            bias = bias_in.data_ptr()
        status = self._forward(
            x.data_ptr(),
            weight_in.data_ptr(),
            bias,
            weight_out.data_ptr(),
            y.data_ptr(),
            visited,
            logits,
            num_rows,
            in_width,
            out_width,
            trees,
            depth,
            ACTIVATION_CODES[activation],
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
        )
        if status:
            _raise_status(status)
        return y

    def backward(
        self, grad_y, x, weight_in, bias_in, weight_out, visited, logits, activation, output_mask
    ) -> list[Tensor | None]:
        if self._backward is None:
            self._load()
        _check_paths(grad_y, x, weight_out, visited, logits)
        num_rows, trees, levels = logits.shape
        check_arguments(x, weight_in, bias_in, weight_out, trees, levels - 1, activation)
        inputs = (x, weight_in, bias_in, weight_out)
        if num_rows > MAX_BACKWARD_ROWS:
            return self._backward_in_chunks(grad_y, inputs, visited, logits, activation, output_mask)
        allocate = torch.empty if num_rows else torch.zeros
        gradients = [
            allocate(t.shape, dtype=t.dtype) if wanted and t is not None else None
            for t, wanted in zip(inputs, output_mask)
        ]
        if num_rows == 0:
            return gradients
        sources = [t.contiguous() for t in (grad_y, x, weight_in, weight_out, visited, logits)]
        status = self._backward(
            *(t.data_ptr() for t in sources),
            *(None if t is None else t.data_ptr() for t in gradients),
            num_rows,
            x.shape[1],
            weight_out.shape[1],
            trees,
            levels - 1,
            ACTIVATION_CODES[activation],
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
        )
        if status:
            _raise_status(status)
        return gradients

    def _backward_in_chunks(self, grad_y, inputs, visited, logits, activation, output_mask) -> list[Tensor | None]:
        """Gradients of more rows than one call of the library numbers; those of parameters are summed in float32."""
        x, *parameters = inputs
        grads_x, totals = [], [None] * len(parameters)
        chunks = (t.split(MAX_BACKWARD_ROWS) for t in (grad_y, x, visited, logits))
        for some_grad_y, some_x, some_visited, some_logits in zip(*chunks):
            call = (some_grad_y, some_x, *parameters, some_visited, some_logits, activation, output_mask)
            grad_x, *gradients = self.backward(*call)
            grads_x.append(grad_x)
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    totals[i] = gradient.float() if totals[i] is None else totals[i].add_(gradient)
        return [
            torch.cat(grads_x) if output_mask[0] else None,
            *(None if total is None else total.to(x.dtype) for total in totals),
        ]


def _check_paths(grad_y: Tensor, x: Tensor, weight_out: Tensor, visited: Tensor, logits: Tensor) -> None:
    if grad_y.shape != (x.shape[0], weight_out.shape[1]) or grad_y.dtype != x.dtype or not grad_y.is_cpu:
        raise ValueError(
            f"grad_y is {tuple(grad_y.shape)} {grad_y.dtype} {grad_y.device}; expected "
            f"({x.shape[0]}, {weight_out.shape[1]}) {x.dtype} cpu"
        )
    if (
        logits.dim() != 3
        or visited.shape != logits.shape
        or logits.shape[0] != x.shape[0]
        or visited.dtype != torch.int32
        or logits.dtype != torch.float32
        or not (visited.is_cpu and logits.is_cpu)
    ):
        raise ValueError(
            f"visited is {tuple(visited.shape)} {visited.dtype} and logits {tuple(logits.shape)} {logits.dtype}; "
            f"expected ({x.shape[0]}, trees, depth + 1) int32 and float32 on the CPU"
        )


def _raise_status(status: int, paths: str = "visited does not hold paths") -> None:
    if status == STATUS_NO_MEMORY:
        raise MemoryError("the native FFF kernels could not allocate scratch memory")
    if status == STATUS_BAD_PATH:
        raise ValueError(f"{paths} from the root to a leaf, as the op's forward returns them")
    if status == STATUS_NO_DATA:
        raise ValueError(
            "a tensor has no memory of its own (torch._efficientzerotensor); expected one that has: clone it"
        )
    raise AssertionError(f"the native FFF kernels refused their arguments (status {status})")
