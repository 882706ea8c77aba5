"""The `native` backend of the published form."""

import torch
from torch import Tensor

from fastbert_hf.fff_reference import check_arguments

from .kernels import NativeKernels, check_saved

NOT_SAVED = (None, None)


class NativeBackend(NativeKernels):
    """Trees of single neurons. Arguments and results as `fff_reference.fff_forward` and `fff_backward`."""

    forward_symbol, backward_symbol = "fff_forward", "fff_backward"
    max_depth = 30  # node numbers are int32
    paths = "visited does not hold paths"

    def infer(self, x, weight_in, bias_in, weight_out, trees, depth, activation) -> Tensor:
        check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
        tensors = (x, weight_in, bias_in, weight_out)
        return self.run_forward(tensors, weight_out.shape[1], NOT_SAVED, (trees, depth), activation)

    def forward(self, x, weight_in, bias_in, weight_out, trees, depth, activation):
        check_arguments(x, weight_in, bias_in, weight_out, trees, depth, activation)
        paths = (x.shape[0], trees, depth + 1)
        saved = x.new_empty(paths, dtype=torch.int32), x.new_empty(paths, dtype=torch.float32)
        tensors = (x, weight_in, bias_in, weight_out)
        return self.run_forward(tensors, weight_out.shape[1], saved, (trees, depth), activation), *saved

    def backward(
        self, grad_y, x, weight_in, bias_in, weight_out, visited, logits, activation, output_mask
    ) -> list[Tensor | None]:
        levels = "trees, depth + 1"
        saved = {"visited": (visited, levels, torch.int32), "logits": (logits, levels, torch.float32)}
        check_saved(grad_y, x, weight_out, saved)
        num_rows, trees, levels = logits.shape
        check_arguments(x, weight_in, bias_in, weight_out, trees, levels - 1, activation)
        inputs = (x, weight_in, bias_in, weight_out)
        if num_rows > self.max_backward_rows:
            return self.backward_in_chunks(grad_y, inputs, (visited, logits), activation, output_mask)
        sources = (grad_y, x, weight_in, weight_out, visited, logits)
        sizes = (trees, levels - 1)
        return self.run_backward(sources, inputs, weight_out.shape[1], sizes, activation, output_mask)
