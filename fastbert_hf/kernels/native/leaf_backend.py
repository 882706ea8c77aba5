"""The `native` backend of leaf trees."""

import torch
from torch import Tensor

from fastbert_hf.leaf_reference import check_leaf_arguments, leaves_per_tree

from .kernels import NativeKernels, check_saved

NOT_SAVED = (None, None, None, None)


class NativeLeafBackend(NativeKernels):
    """Leaf trees. Arguments and results as `leaf_reference.leaf_forward` and `leaf_backward`."""

    forward_symbol, backward_symbol = "fff_leaf_forward", "fff_leaf_backward"
    max_depth = 24  # as csrc/library.cpp
    paths = "leaves and deciders do not hold paths"

    def infer(self, *arguments) -> Tensor:
        width = check_leaf_arguments(*arguments)
        return self._run(arguments, width, NOT_SAVED)

    def forward(self, *arguments):
        width, x, trees = check_leaf_arguments(*arguments), arguments[0], arguments[7]
        routes = (x.shape[0], trees)
        saved = (
            x.new_empty(routes, dtype=torch.int32),
            x.new_empty(routes, dtype=torch.int32),
            x.new_empty(routes, dtype=torch.float32),
            x.new_empty((*routes, width), dtype=torch.float32),
        )
        return self._run(arguments, width, saved), *saved

    def _run(self, arguments, width, saved) -> Tensor:
        *tensors, trees, depth, activation = arguments
        return self.run_forward(tensors, tensors[5].shape[1], saved, (trees, width, depth), activation)

    def backward(self, grad_y, *arguments) -> list[Tensor | None]:
        *inputs, leaves, deciders, margins, logits, activation, output_mask = arguments
        x, router, _, weight_in, _, weight_out, bias_out = inputs
        saved = {
            "leaves": (leaves, "trees", torch.int32),
            "deciders": (deciders, "trees", torch.int32),
            "margins": (margins, "trees", torch.float32),
            "logits": (logits, "trees, w", torch.float32),
        }
        check_saved(grad_y, x, weight_out, saved)
        (num_rows, trees, width), neurons = logits.shape, weight_in.shape[0]
        depth = (neurons // max(1, trees * width)).bit_length() - 1
        found = check_leaf_arguments(*inputs, trees, depth, activation)
        if found != width or leaves_per_tree(depth) * trees * width != neurons:
            raise ValueError(f"logits are {width} wide; expected the leaf width {found}")
        routes = (leaves, deciders, margins, logits)
        if num_rows > self.max_backward_rows:
            return self.backward_in_chunks(grad_y, inputs, routes, activation, output_mask)
        sources = (grad_y, x, router, weight_in, weight_out, bias_out, *routes)
        sizes = (trees, width, depth)
        return self.run_backward(sources, inputs, weight_out.shape[1], sizes, activation, output_mask)
