# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""`QuantizedLinear`: a linear layer with int8 weights, for inference on a CPU.

Weights are quantised row by row, symmetrically (one scale an output); every row of the input as it comes, to uint8
with a scale and a zero point of its own. So a token's output does not depend on what stands beside it.
`encoder_reference.linear_int8_forward` is the definition, and the op `linear_int8` computes it.

Source: the scheme is that of arXiv 1712.05877, with one scale a token as in arXiv 2206.01861.
"""

import torch
from torch import Tensor, nn

from .encoder_op import linear_int8
from .quantized_weights import pack, quantize_weights


class QuantizedLinear(nn.Module):
    """`nn.Linear` with int8 weights. `from_float` makes one of a trained layer.

    Args: in_features: K. out_features: O. bias: whether there is one.
    Buffers: weight (O, K) int8, weight_scale (O,) float32, weight_sum (O,) int32: sums of the rows of weight; bias
        (O,) float32 or None.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, device: torch.device | str | None = None
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.zeros(out_features, device=device, dtype=torch.float32))
        self.register_buffer("weight_sum", torch.zeros(out_features, dtype=torch.int32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=torch.float32) if bias else None)
        self._packed = None

    @classmethod
    @torch.no_grad()
    def from_float(cls, linear: nn.Linear) -> "QuantizedLinear":
        """Quantise the weights of a layer, on its device.

        Raises:
            ValueError: weights that are not finite.
        """
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device=linear.weight.device)
        weight, scale = quantize_weights(linear.weight)
        new.weight.copy_(weight)
        new.weight_scale.copy_(scale)
        new.weight_sum.copy_(weight.sum(-1, dtype=torch.int32))
        if linear.bias is not None:
            new.bias.copy_(linear.bias)
        return new

    @classmethod
    def joined(cls, *layers: "QuantizedLinear") -> "QuantizedLinear":
        """One layer whose output is that of layers with one input, side by side."""
        first = layers[0]
        outputs = sum(layer.out_features for layer in layers)
        new = cls(first.in_features, outputs, first.bias is not None, device=first.weight.device)
        for name, buffer in new.named_buffers():
            buffer.copy_(torch.cat([getattr(layer, name) for layer in layers]))
        return new

    def __getstate__(self):
        return {**self.__dict__, "_packed": None}  # packed for one machine

    def _apply(self, function, recurse=True):
        """As `nn.Module._apply`, but `layer.to(torch.bfloat16)` changes no dtype."""
        before = dict(self._buffers)
        super()._apply(function, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        self._packed = None
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None

    def op_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The op's arguments after x. Weights are packed at the first call."""
        if self._packed is None:
            self._packed = pack(self.weight)
        return self._packed, self.weight_scale, self.weight_sum, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., O), dtype of x. Not differentiable: backward through it raises."""
        rows = x.reshape(-1, self.in_features)
        return linear_int8(rows, *self.op_arguments()).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weights=int8"


__all__ = ["QuantizedLinear"]
