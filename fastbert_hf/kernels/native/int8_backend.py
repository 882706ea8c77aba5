"""The `native` backends of trees with int8 weights."""

import torch
from torch import Tensor

from fastbert_hf.quantized_reference import (
    QuantizedLeafCall,
    check_quantized_arguments,
    check_quantized_leaf_arguments,
)

from .kernels import NativeFunctions, NativeKernels
from .library import load_library

NOT_SAVED = (None, None)


class Int8Products(NativeFunctions):
    """Kernels whose products with int8 weights have an instruction set of their own."""

    def describe(self) -> str:
        return f"{super().describe()}, products of int8 by {load_library().fff_int8_products().decode()}"


class NativeQuantizedLeafBackend(Int8Products, NativeKernels):
    """Leaf trees. Arguments as `QuantizedLeafCall`, results as `quantized_reference.leaf_trees_int8_forward`."""

    forward_symbol = "fff_int8_leaf_forward"
    max_depth = 24  # as csrc/library.cpp

    def infer(self, *arguments) -> Tensor:
        call = QuantizedLeafCall(*arguments)
        return self._run(call, check_quantized_leaf_arguments(call), NOT_SAVED)

    def forward(self, *arguments) -> tuple[Tensor, Tensor, Tensor]:
        call = QuantizedLeafCall(*arguments)
        width, routes = check_quantized_leaf_arguments(call), (call.x.shape[0], call.trees)
        saved = (call.x.new_empty(routes, dtype=torch.int32), call.x.new_empty(routes, dtype=torch.float32))
        return self._run(call, width, saved), *saved

    def _run(self, call: QuantizedLeafCall, width: int, saved) -> Tensor:
        sizes = (call.trees, width, call.depth)
        return self.run_forward(call[:-3], call.scale_out.shape[1], saved, sizes, call.activation)


class NativeQuantizedBackend(NativeKernels):
    """Trees of single neurons. Arguments and results as `quantized_reference.fff_int8_forward`."""

    forward_symbol = "fff_int8_forward"
    max_depth = 30  # node numbers are int32

    def infer(self, *arguments) -> Tensor:
        check_quantized_arguments(*arguments)
        return self._run(arguments, (None,))

    def forward(self, *arguments) -> tuple[Tensor, Tensor]:
        check_quantized_arguments(*arguments)
        x, trees, depth = arguments[0], *arguments[-3:-1]
        visited = x.new_empty((x.shape[0], trees, depth + 1), dtype=torch.int32)
        return self._run(arguments, (visited,)), visited

    def _run(self, arguments, saved) -> Tensor:
        *tensors, trees, depth, activation = arguments
        return self.run_forward(tensors, tensors[3].shape[1], saved, (trees, depth), activation)
