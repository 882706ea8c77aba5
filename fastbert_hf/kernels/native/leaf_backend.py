"""The `native` backend of leaf trees: checks and buffers around the compiled kernels."""

import torch
from torch import Tensor

from fastbert_hf.leaf_reference import check_leaf_arguments, leaves_per_tree

from .backend import ACTIVATION_CODES, DTYPE_CODES, MAX_BACKWARD_ROWS, NativeBackend, _raise_status
from .library import load_library


class NativeLeafBackend(NativeBackend):
    """C++ kernels of leaf trees for CPUs: float32 and bfloat16, accumulated in float32.

    Results are as reproducible as those of `NativeBackend`.
    """

    max_depth = 24  # as csrc/library.cpp

    def _load(self) -> None:
        library = load_library()
        self._backward, self._forward = library.fff_leaf_backward, library.fff_leaf_forward

    def infer(self, x, *arguments) -> Tensor:
        width = check_leaf_arguments(x, *arguments)
        return self._run(x, arguments, width, (None, None, None, None))

    def forward(self, x, *arguments):
        width, trees = check_leaf_arguments(x, *arguments), arguments[6]
        routes = (x.shape[0], trees)
        saved = (
            x.new_empty(routes, dtype=torch.int32),
            x.new_empty(routes, dtype=torch.int32),
            x.new_empty(routes, dtype=torch.float32),
            x.new_empty((*routes, width), dtype=torch.float32),
        )
        return self._run(x, arguments, width, saved), *saved

    def _run(self, x, arguments, width, saved) -> Tensor:
        if self._forward is None:
            self._load()
        *parameters, trees, depth, activation = arguments
        num_rows, out_width = x.shape[0], parameters[4].shape[1]
        y = x.new_empty((num_rows, out_width))
        if num_rows == 0:
            return y
        tensors = [t if t is None else t.contiguous() for t in (x, *parameters)]  # kept alive during the call
        status = self._forward(
            *(t if t is None else t.data_ptr() for t in tensors),
            y.data_ptr(),
            *(t if t is None else t.data_ptr() for t in saved),
            num_rows,
            x.shape[1],
            out_width,
            trees,
            width,
            depth,
            ACTIVATION_CODES[activation],
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
        )
        if status:
            _raise_status(status)
        return y

    def backward(
        self,
        grad_y,
        x,
        router,
        threshold,
        weight_in,
        bias_in,
        weight_out,
        bias_out,
        leaves,
        deciders,
        margins,
        logits,
        activation,
        output_mask,
    ) -> list[Tensor | None]:
        if self._backward is None:
            self._load()
        _check_saved(grad_y, x, weight_out, leaves, deciders, margins, logits)
        (num_rows, trees, width), neurons = logits.shape, weight_in.shape[0]
        depth = (neurons // max(1, trees * width)).bit_length() - 1
        inputs = (x, router, threshold, weight_in, bias_in, weight_out, bias_out)
        found = check_leaf_arguments(*inputs, trees, depth, activation)
        if found != width or leaves_per_tree(depth) * trees * width != neurons:
            raise ValueError(f"logits are {width} wide; expected the leaf width {found}")
        if num_rows > MAX_BACKWARD_ROWS:
            raise ValueError(f"x has {num_rows} rows; expected at most {MAX_BACKWARD_ROWS} in one backward pass")
        allocate = torch.empty if num_rows else torch.zeros
        gradients = [
            allocate(t.shape, dtype=t.dtype) if wanted and t is not None else None
            for t, wanted in zip(inputs, output_mask)
        ]
        if num_rows == 0:
            return gradients
        sources = (grad_y, x, router, weight_in, weight_out, bias_out, leaves, deciders, margins, logits)
        sources = [t if t is None else t.contiguous() for t in sources]
        status = self._backward(
            *(t if t is None else t.data_ptr() for t in (*sources, *gradients)),
            num_rows,
            x.shape[1],
            weight_out.shape[1],
            trees,
            width,
            depth,
            ACTIVATION_CODES[activation],
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
        )
        if status:
            _raise_status(status, "leaves and deciders do not hold paths")
        return gradients


def _check_saved(grad_y, x, weight_out, leaves, deciders, margins, logits) -> None:
    if grad_y.shape != (x.shape[0], weight_out.shape[1]) or grad_y.dtype != x.dtype or not grad_y.is_cpu:
        raise ValueError(
            f"grad_y is {tuple(grad_y.shape)} {grad_y.dtype} {grad_y.device}; expected "
            f"({x.shape[0]}, {weight_out.shape[1]}) {x.dtype} cpu"
        )
    expected = (("leaves", leaves, 2, torch.int32), ("deciders", deciders, 2, torch.int32))
    expected += (("margins", margins, 2, torch.float32), ("logits", logits, 3, torch.float32))
    for name, tensor, dims, dtype in expected:
        if tensor.dim() != dims or tensor.shape[:2] != logits.shape[:2] or tensor.shape[0] != x.shape[0]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; expected ({x.shape[0]}, trees{', w' * (dims == 3)})")
        if tensor.dtype != dtype or not tensor.is_cpu:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected {dtype} on the CPU")
