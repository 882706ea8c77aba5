# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""`QuantizedLeafFeedForward` and `QuantizedFastFeedForward`: the layers of trees with int8 weights, for inference."""

import torch
from torch import Tensor

from .fff_layer import FastFeedForward, TreeLayer
from .fff_reference import MAX_DEPTH, nodes_per_tree
from .leaf_layer import LeafFeedForward
from .leaf_reference import MAX_LEAF_DEPTH, confidence_of, leaves_per_tree
from .quantized_op import fff_int8, leaf_trees_int8
from .quantized_weights import pack, padded_columns, quantize_weights, unpack

LEAST_COLUMN = 2.0**-10  # of the largest one: columns that are smaller share its scale


def column_sizes(matrix: Tensor) -> Tensor:
    """Root mean square of the columns of a matrix (R, K) relative to the largest, at least 2^-10: (K,) float32."""
    sizes = matrix.float().square().mean(0).sqrt()
    return torch.where(sizes.max() > 0, sizes / sizes.max(), 1.0).clamp(min=LEAST_COLUMN)


class QuantizedTreeLayer(TreeLayer):
    """What the layers with int8 weights share: their state is buffers, and those of float32 stay float32."""

    def _apply(self, function, recurse=True):
        """As `nn.Module._apply`, but `layer.to(torch.bfloat16)` changes no dtype: only x and y have another one."""
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        before = dict(self._buffers)
        super()._apply(function, recurse)
        for name, dtype in dtypes.items():
            if self._buffers[name].dtype != dtype:
                self._buffers[name] = before[name].to(self._buffers[name].device)
        return self

    def _hold(self, device, **shapes: tuple[torch.dtype, tuple[int, ...]] | None) -> None:
        """Register buffers of zeros; None stands for a parameter that this layer does not have."""
        for name, described in shapes.items():
            buffer = None if described is None else torch.zeros(described[1], dtype=described[0], device=device)
            self.register_buffer(name, buffer)

    def _fill(self, **values: Tensor | None) -> None:
        for name, value in values.items():
            if value is not None:
                self._buffers[name].copy_(value)


class QuantizedLeafFeedForward(QuantizedTreeLayer):
    """`LeafFeedForward` with int8 weights, for inference. `from_float` makes one of a trained layer.

    Args: those of `LeafFeedForward`, so that a configuration builds an empty layer for `load_state_dict`;
        initializer_range and dtype change nothing.
    Buffers: router (P*r, H), threshold (P*r,), input_scale (H,), scale_in (P*m*w,), bias_in (P*m*w,) or None,
        scale_out (P*m, H_out), bias_out (P*m, H_out) or None: float32. weight_in (P*m, w * padded H), weight_out
        (P*m, H_out * padded w): int8, packed leaf by leaf as `quantized_weights.pack` says. sum_in (P*m*w,),
        sum_out (P*m, H_out): int32, sums of the rows of both.
    Raises:
        ValueError: a size outside its range or an unknown activation.
    Source: quantized_op.py.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        leaf_width: int,
        trees: int = 1,
        activation: str = "gelu",
        bias: bool = True,
        *,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features, out_features, depth, trees, activation, initializer_range,
            max_depth=MAX_LEAF_DEPTH, leaf_width=leaf_width,
        )  # fmt: skip
        self.leaf_width = leaf_width
        leaves = trees * leaves_per_tree(depth)
        routers, neurons, outputs = leaves - trees, leaves * leaf_width, (leaves, out_features)
        self._hold(
            device,
            router=(torch.float32, (routers, in_features)),
            threshold=(torch.float32, (routers,)),
            input_scale=(torch.float32, (in_features,)),
            weight_in=(torch.int8, (leaves, leaf_width * padded_columns(in_features))),
            scale_in=(torch.float32, (neurons,)),
            sum_in=(torch.int32, (neurons,)),
            bias_in=(torch.float32, (neurons,)) if bias else None,
            weight_out=(torch.int8, (leaves, out_features * padded_columns(leaf_width))),
            scale_out=(torch.float32, outputs),
            sum_out=(torch.int32, outputs),
            bias_out=(torch.float32, outputs) if bias else None,
        )

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: LeafFeedForward, input_range: Tensor | None = None) -> "QuantizedLeafFeedForward":
        """Quantise the weights of a layer.

        Args:
            layer: float32, bfloat16, float16 or float64.
            input_range: (H,), how large each column of x is, up to a common factor: the largest magnitudes in data,
                or |bias| + 3 |weight| of a LayerNorm that gives x. It balances the columns between x and weight_in.
                By default columns are taken to be as large as those of weight_in are small.
        Returns: the layer on the same device, in the same mode.
        Raises:
            ValueError: weights that are not finite, or an input_range that does not fit.
        """
        new = cls(
            layer.in_features, layer.out_features, layer.depth, layer.leaf_width, layer.trees, layer.activation,
            layer.bias_in is not None, initializer_range=layer.initializer_range, device=layer.weight_in.device,
        )  # fmt: skip
        input_scale = column_sizes(layer.weight_in)
        if input_range is not None:
            if input_range.shape != (layer.in_features,) or not (input_range >= 0).all():
                raise ValueError(
                    f"input_range has shape {tuple(input_range.shape)}; expected ({layer.in_features},) with values "
                    "of at least 0"
                )
            input_scale = (input_scale / column_sizes(input_range.to(input_scale.device).unsqueeze(0))).sqrt()
        width = layer.leaf_width
        q_in, scale_in = quantize_weights(layer.weight_in.float() / input_scale)
        q_out, scale_out = quantize_weights(layer.weight_out.unflatten(0, (-1, width)).mT)  # (P*m, H_out, w)
        new._fill(
            router=layer.router,
            threshold=layer.threshold,
            input_scale=input_scale,
            weight_in=pack(q_in.unflatten(0, (-1, width))),
            scale_in=scale_in,
            sum_in=q_in.sum(-1),
            bias_in=layer.bias_in,
            weight_out=pack(q_out),
            scale_out=scale_out,
            sum_out=q_out.sum(-1),
            bias_out=layer.bias_out,
        )
        return new.train(layer.training)

    @torch.no_grad()
    def dequantize(self) -> LeafFeedForward:
        """The float32 layer with the weights that the int8 ones stand for."""
        layer = LeafFeedForward(
            self.in_features, self.out_features, self.depth, self.leaf_width, self.trees, self.activation,
            self.bias_in is not None, initializer_range=self.initializer_range, device=self.router.device,
            dtype=torch.float32,
        )  # fmt: skip
        q_in = unpack(self.weight_in, self.leaf_width, self.in_features).flatten(0, 1)
        q_out = unpack(self.weight_out, self.out_features, self.leaf_width)
        weight_out = (q_out * self.scale_out.unsqueeze(-1)).mT.flatten(0, 1)
        values = {"weight_in": q_in * self.scale_in.unsqueeze(-1) * self.input_scale, "weight_out": weight_out}
        for name, parameter in layer.named_parameters():
            parameter.copy_(values.get(name, getattr(self, name)))
        return layer.train(self.training)

    neurons, neurons_per_token = LeafFeedForward.neurons, LeafFeedForward.neurons_per_token

    def op_arguments(self) -> tuple:
        """The op's arguments after x."""
        return (
            self.router,
            self.threshold,
            self.input_scale,
            self.weight_in,
            self.scale_in,
            self.sum_in,
            self.bias_in,
            self.weight_out,
            self.scale_out,
            self.sum_out,
            self.bias_out,
            self.trees,
            self.depth,
            self.activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H_out), dtype of x. Not differentiable: backward through it raises."""
        return self.by_rows(leaf_trees_int8, x, self.op_arguments())

    @torch.no_grad()
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The leaf of each row in each tree, from the left, and its confidence: (..., H) -> (..., P) int64, float."""
        rows = x.reshape(-1, x.shape[-1])
        _, leaves, margins = torch.ops.fastbert.leaf_trees_int8_v1(rows, *self.op_arguments())
        shape = (*x.shape[:-1], self.trees)
        return leaves.view(shape).long(), confidence_of(margins).view(shape)

    def extra_repr(self) -> str:
        return f"{LeafFeedForward.extra_repr(self)}, weights=int8"


class QuantizedFastFeedForward(QuantizedTreeLayer):
    """`FastFeedForward` with int8 output weights, for inference. `from_float` makes one of a trained layer.

    Rows of weight_in decide the path, so they stay float32.

    Args: those of `FastFeedForward`; initializer_range and dtype change nothing.
    Buffers: weight_in (P*n, H), bias_in (P*n,) or None, scale_out (P*n,), output_scale (H_out,): float32; weight_out
        (P*n, H_out): int8, its row k is scale_out[k] * output_scale * q[k].
    Raises:
        ValueError: a size below its minimum or an unknown activation.
    Source: quantized_op.py.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        trees: int = 1,
        activation: str = "gelu",
        bias: bool = True,
        *,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, depth, trees, activation, initializer_range, max_depth=MAX_DEPTH)
        rows = trees * nodes_per_tree(depth)
        self._hold(
            device,
            weight_in=(torch.float32, (rows, in_features)),
            bias_in=(torch.float32, (rows,)) if bias else None,
            weight_out=(torch.int8, (rows, out_features)),
            scale_out=(torch.float32, (rows,)),
            output_scale=(torch.float32, (out_features,)),
        )

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: FastFeedForward) -> "QuantizedFastFeedForward":
        """Quantise the output weights of a layer.

        Args:
            layer: float32, bfloat16, float16 or float64.
        Returns: the layer on the same device, in the same mode.
        Raises:
            ValueError: weights that are not finite.
        """
        new = cls(
            layer.in_features, layer.out_features, layer.depth, layer.trees, layer.activation,
            layer.bias_in is not None, initializer_range=layer.initializer_range, device=layer.weight_in.device,
        )  # fmt: skip
        output_scale = column_sizes(layer.weight_out)
        weight_out, scale_out = quantize_weights(layer.weight_out.float() / output_scale)
        new._fill(
            weight_in=layer.weight_in,
            bias_in=layer.bias_in,
            weight_out=weight_out,
            scale_out=scale_out,
            output_scale=output_scale,
        )
        return new.train(layer.training)

    @torch.no_grad()
    def dequantize(self) -> FastFeedForward:
        """The float32 layer with the weights that the int8 ones stand for."""
        layer = FastFeedForward(
            self.in_features, self.out_features, self.depth, self.trees, self.activation, self.bias_in is not None,
            initializer_range=self.initializer_range, device=self.weight_in.device, dtype=torch.float32,
        )  # fmt: skip
        layer.weight_in.copy_(self.weight_in)
        layer.weight_out.copy_(self.weight_out * self.scale_out.unsqueeze(-1) * self.output_scale)
        if self.bias_in is not None:
            layer.bias_in.copy_(self.bias_in)
        return layer.train(self.training)

    neurons, neurons_per_token = FastFeedForward.neurons, FastFeedForward.neurons_per_token

    def op_arguments(self) -> tuple:
        """The op's arguments after x."""
        return (
            self.weight_in,
            self.bias_in,
            self.weight_out,
            self.scale_out,
            self.output_scale,
            self.trees,
            self.depth,
            self.activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H_out), dtype of x. Not differentiable: backward through it raises."""
        return self.by_rows(fff_int8, x, self.op_arguments())

    @torch.no_grad()
    def route(self, x: Tensor) -> Tensor:
        """Visited nodes, numbered inside their tree: (..., H) -> (..., P, D+1) int64."""
        rows = x.reshape(-1, x.shape[-1])
        visited = torch.ops.fastbert.fff_int8_v1(rows, *self.op_arguments())[1]
        return visited.view(*x.shape[:-1], self.trees, self.depth + 1).long()

    def extra_repr(self) -> str:
        return f"{FastFeedForward.extra_repr(self)}, weight_out=int8"
