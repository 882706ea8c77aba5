# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""`QuantizedLinear`: a linear layer with int8 weights, for inference on a CPU.

Weights are quantised row by row, symmetrically (one scale an output); activations as they come, the whole input with
one scale and zero point (dynamic quantisation, as PyTorch's and ONNX Runtime's):

    y = scale * (q(x) - zero) W_q^T * weight_scale + bias,   scale = (max(x, 0) - min(x, 0)) / 255

The sums are integers. `torch.ops.quantized.linear_dynamic` computes them, with FBGEMM or oneDNN and weights packed at
the first call: it takes a fifth to a third of float32's time, and a third of what `torch._int_mm` takes with separate
operations that quantise. It needs a CPU with AVX-512 VNNI: elsewhere FBGEMM adds pairs of products in 16 bits, which
saturate. There, and where a model is compiled or exported, the formula is computed around `torch._int_mm`.

Source: the scheme is that of arXiv 1712.05877.
"""

import warnings

import torch
from torch import Tensor, nn

from .dispatch_fastbert import is_exporting
from .quantized_weights import quantize_weights

ENGINES = ("x86", "fbgemm", "onednn")  # of torch.backends.quantized, those that add in 32 bits where VNNI is
SMALLEST_SCALE = 2.0**-120


def packed_products() -> bool:
    """Whether this machine has the packed int8 products that PyTorch brings."""
    return torch.backends.quantized.engine in ENGINES and torch.cpu._is_vnni_supported()


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

    def _pack(self):
        """The weights as the library wants them; False where the formula is computed instead."""
        if not (self.weight.is_cpu and packed_products()):
            return False
        with warnings.catch_warnings():  # PyTorch means to replace this kind of tensor: `_formula` needs none
            warnings.simplefilter("ignore")
            scale = self.weight_scale.double().clamp(min=SMALLEST_SCALE)
            zeros = torch.zeros(self.out_features, dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(self.weight, scale, zeros, 0)
            return torch.ops.quantized.linear_prepack(weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., O), dtype of x. Not differentiable.

        Raises:
            RuntimeError: x needs a gradient.
        """
        if torch.compiler.is_compiling() or is_exporting():
            return self._formula(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a layer with int8 weights has no gradient; got an input that requires one")
        packed = self._packed
        if packed is None:
            packed = self._packed = self._pack()
        if packed is False or not x.numel():
            return self._formula(x)
        if x.dtype is torch.float32:
            return torch.ops.quantized.linear_dynamic(x, packed)
        return torch.ops.quantized.linear_dynamic(x.float(), packed).to(x.dtype)

    def _formula(self, x: Tensor) -> Tensor:
        """The layer from plain operations."""
        rows = x.reshape(-1, self.in_features).float()  # (..., K) -> (N, K)
        low = rows.amin().clamp(max=0) if x.numel() else rows.new_zeros(())
        high = rows.amax().clamp(min=0) if x.numel() else rows.new_zeros(())
        scale = ((high - low) / 255).clamp(min=SMALLEST_SCALE)
        zero = (-low / scale).round()
        q = ((rows / scale).round() + zero).clamp(0, 255) - 128
        if is_exporting():
            sums = q @ self.weight.float().t()  # exporters do not know the product of integers
        else:
            sums = torch._int_mm(q.to(torch.int8), self.weight.t()).float()
        y = (sums - (zero - 128) * self.weight_sum) * (scale * self.weight_scale)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weights=int8"


__all__ = ["QuantizedLinear"]
