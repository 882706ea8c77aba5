"""The `triton` backend of the FFF op: checks and buffers around the kernels."""

import functools
import os
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from fastbert_hf.fff_reference import check_arguments
from fastbert_hf.kernels.triton.regimes import choose_regime
from fastbert_hf.kernels.triton.verification import Verifications, compare, too_old

ACTIVATION_NAMES = ("gelu", "gelu_tanh", "relu", "silu")  # by their codes in activations.py
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH, MAX_DEPTH = 4096, 12  # a program holds a whole row; what has been tested


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors: TRITON_INTERPRET=1, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


def _allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class TritonBackend:
    """Triton kernels for GPUs: float32, bfloat16 and float16, accumulated in float32.

    Forward and backward are deterministic. A row's result does not depend on what the other rows of the call hold;
    their number chooses between two orders of summation (regimes.py). Sums are float32. torch's TF32 setting holds
    for products that do not affect routing; logits are never rounded. On first use on a device, calls of each kind
    are compared with the reference (verification.py).
    """

    name = "triton"

    def __init__(self):
        self._verifications = Verifications()

    def unavailable(self) -> str | None:
        if not _is_installed():
            return "the package triton is not installed"
        if not (interpreting() or torch.cuda.is_available()):
            return "there is no GPU that torch can use"
        return None

    def supports(
        self, x: Tensor, weight_in: Tensor, weight_out: Tensor, trees: int, depth: int, activation: str
    ) -> str | None:
        kind = "cpu" if interpreting() else "cuda"
        if x.device.type != kind or weight_in.device.type != kind or weight_out.device.type != kind:
            return self.unavailable() or f"it runs on {kind} tensors here, not on {x.device}"
        if not _is_installed():
            return self.unavailable()
        if x.dtype not in DTYPES:
            return f"it computes float32, bfloat16 and float16, not {x.dtype}"
        if max(x.shape[-1], weight_out.shape[-1]) > MAX_WIDTH:
            return f"a row is {max(x.shape[-1], weight_out.shape[-1])} wide; at most {MAX_WIDTH}"
        if depth > MAX_DEPTH:
            return f"depth is {depth}; at most {MAX_DEPTH}"
        if x.layout is not torch.strided:
            return f"x has layout {x.layout}"
        if kind == "cpu" or x.dim() != 2 or weight_out.dim() != 2 or activation not in ACTIVATION_NAMES:
            return None  # nothing to verify on an interpreter, or in a call whose arguments will be refused
        return self._differs(x, weight_out, trees, depth, activation)

    def _differs(self, x, weight_out, trees, depth, activation) -> str | None:
        """Why this device must not run this kind of call, or None."""
        reason = too_old(x.device)
        if reason is not None or x.shape[0] == 0:
            return reason
        regime, tf32 = choose_regime(x.shape[0], depth), x.dtype == torch.float32 and _allows_tf32()
        sizes = (x.shape[1], weight_out.shape[1], min(trees, 2), depth)
        kind = (x.device, x.dtype, activation, sizes, regime, tf32)
        return self._verifications.reason(kind, x.device, lambda: compare(self, *kind))

    def infer(self, x, weight_in, bias_in, weight_out, trees, depth, activation, regime=None) -> Tensor:
        check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
        return self._run(x, weight_in, bias_in, weight_out, trees, depth, activation, None, None, regime)

    def forward(self, x, weight_in, bias_in, weight_out, trees, depth, activation, regime=None):
        check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
        paths = (x.shape[0], trees, depth + 1)
        visited, logits = x.new_empty(paths, dtype=torch.int32), x.new_empty(paths, dtype=torch.float32)
        y = self._run(x, weight_in, bias_in, weight_out, trees, depth, activation, visited, logits, regime)
        return y, visited, logits

    def _run(self, x, weight_in, bias_in, weight_out, trees, depth, activation, visited, logits, regime) -> Tensor:
        from .walk import walk_forward

        rows, width = x.shape
        out_width = weight_out.shape[1]
        if rows == 0:
            return x.new_empty(0, out_width)
        if (regime or choose_regime(rows, depth)) == "subtrees":
            return self._run_subtrees(x, weight_in, bias_in, weight_out, trees, depth, activation, visited, logits)
        y = x.new_empty(rows, out_width, dtype=_stored(x.dtype))
        with _device_of(x):
            walk_forward[(rows,)](
                x.contiguous(),
                weight_in.contiguous(),
                y if bias_in is None else bias_in.contiguous(),
                weight_out.contiguous(),
                y,
                y if visited is None else visited,
                y if logits is None else logits,
                width,
                out_width,
                trees,
                DEPTH=depth,
                ACTIVATION=ACTIVATION_NAMES.index(activation),
                HAS_BIAS=bias_in is not None,
                SAVE=visited is not None,
                **_blocks(width, out_width),
            )
        return y.to(x.dtype)

    def _run_subtrees(self, x, weight_in, bias_in, weight_out, trees, depth, activation, visited, logits) -> Tensor:
        if visited is None:
            paths = (x.shape[0], trees, depth + 1)
            visited, logits = x.new_empty(paths, dtype=torch.int32), x.new_empty(paths, dtype=torch.float32)
        y = x.new_empty(x.shape[0], weight_out.shape[1], dtype=_summed(x.dtype, trees))
        with _device_of(x):
            _subtrees(x, weight_in, bias_in, weight_out, visited, logits, activation).forward(y)
        return y.to(x.dtype)

    def backward(
        self, grad_y, x, weight_in, bias_in, weight_out, visited, logits, activation, output_mask, regime=None
    ) -> list[Tensor | None]:
        from .walk import walk_backward

        rows, trees, levels = logits.shape
        check_arguments(x, weight_in, bias_in, weight_out, trees, levels - 1, activation)
        inputs = (x, weight_in, bias_in, weight_out)
        if rows == 0:
            return [torch.zeros_like(t) if wanted else None for t, wanted in zip(inputs, output_mask)]
        if (regime or choose_regime(rows, levels - 1)) == "subtrees":
            return self._backward_by_subtrees(grad_y, *inputs, visited, logits, activation, output_mask)
        want_x = output_mask[0]
        grad_y = grad_y.contiguous()
        grad_x = x.new_empty(x.shape, dtype=_stored(x.dtype)) if want_x else None
        grad_logits, activations = torch.empty_like(logits), torch.empty_like(logits)
        with _device_of(x):
            walk_backward[(rows,)](
                grad_y,
                weight_in.contiguous(),
                weight_out.contiguous(),
                visited.contiguous(),
                logits.contiguous(),
                grad_y if grad_x is None else grad_x,
                grad_logits,
                activations,
                x.shape[1],
                weight_out.shape[1],
                trees,
                DEPTH=levels - 1,
                ACTIVATION=ACTIVATION_NAMES.index(activation),
                WANT_X=want_x,
                **_blocks(x.shape[1], weight_out.shape[1]),
            )
            grads = _parameter_gradients(x, grad_y, inputs[1:], visited, grad_logits, activations, output_mask[1:])
        return [grad_x.to(x.dtype) if want_x else None, *grads]

    def _backward_by_subtrees(
        self, grad_y, x, weight_in, bias_in, weight_out, visited, logits, activation, output_mask
    ) -> list[Tensor | None]:
        want_x, want_in, want_bias, want_out = output_mask
        dtypes = (_summed(x.dtype, visited.shape[1]), *[_stored(x.dtype)] * 3)
        buffers = [
            tensor.new_empty(tensor.shape, dtype=dtype) if wanted else None
            for tensor, dtype, wanted in zip(
                (x, weight_in, bias_in, weight_out), dtypes, (want_x, want_in or want_bias, want_bias, want_out)
            )
        ]
        with _device_of(x):
            call = _subtrees(x, weight_in, bias_in, weight_out, visited, logits, activation)
            call.backward(grad_y.contiguous(), *buffers)
        return [buffer.to(x.dtype) if wanted else None for buffer, wanted in zip(buffers, output_mask)]


def _subtrees(x, weight_in, bias_in, weight_out, visited, logits, activation):
    from .subtrees import Subtrees

    tensors = [None if t is None else t.contiguous() for t in (x, weight_in, bias_in, weight_out, visited, logits)]
    tf32 = x.is_cuda and _allows_tf32()
    return Subtrees(*tensors, activation, tf32, widen=interpreting())


def _parameter_gradients(x, grad_y, parameters, visited, grad_logits, activations, wanted) -> list[Tensor | None]:
    """Gradients of weight_in, bias_in, weight_out; None where not wanted."""
    from .segments import Segments

    if not any(wanted):
        return [None] * 3
    weight_in, bias_in, weight_out = parameters
    segments = Segments(visited, weight_in.shape[0])
    sums = [
        (grad_logits, x.contiguous(), weight_in),
        (grad_logits, x.new_ones(x.shape[0], 1), bias_in),
        (activations, grad_y, weight_out),
    ]
    return [
        segments.sum(coefficients, vectors, _stored(vectors.dtype)).to(vectors.dtype).view(parameter.shape)
        if want
        else None
        for (coefficients, vectors, parameter), want in zip(sums, wanted)
    ]


def _stored(dtype: torch.dtype) -> torch.dtype:
    """What kernels write: the interpreter cuts float32 to bfloat16 off instead of rounding, so there torch rounds."""
    return torch.float32 if interpreting() and dtype == torch.bfloat16 else dtype


def _summed(dtype: torch.dtype, trees: int) -> torch.dtype:
    """What kernels write where each tree adds its part: float32, to round once."""
    return torch.float32 if trees > 1 else _stored(dtype)


def _blocks(width: int, out_width: int) -> dict[str, int]:
    """Block sizes and warps for rows of these widths: they fix the order of summation, so nothing else may enter."""
    block_in, block_out = (max(16, 1 << max(0, w - 1).bit_length()) for w in (width, out_width))
    warps = min(8, max(1, max(block_in, block_out) // 256))
    return {"BLOCK_IN": block_in, "BLOCK_OUT": block_out, "num_warps": warps}


def _device_of(tensor: Tensor):
    """Kernels are launched on the current device: make it the tensors' own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
