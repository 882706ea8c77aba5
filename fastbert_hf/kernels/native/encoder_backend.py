"""The `native` backends of what surrounds the feed-forward blocks of an encoder."""

import struct

import torch
from torch import Tensor

from fastbert_hf.encoder_reference import (
    QuantizedAttentionCall,
    check_attention_arguments,
    check_linear_arguments,
    check_norm_arguments,
    check_quantized_attention_arguments,
)

from .int8_backend import Int8Products
from .kernels import NativeFunctions


def bits_of(number: float) -> int:
    """The bits of a double, as the library's blocks of words hold it."""
    return struct.unpack("q", struct.pack("d", number))[0]


class NativeQuantizedLinearBackend(Int8Products):
    """Linear layers. Arguments and results as `encoder_reference.linear_int8_forward`."""

    forward_symbol = "fff_int8_linear"

    def infer(self, *arguments) -> Tensor:
        x = arguments[0]
        y = x.new_empty((x.shape[0], check_linear_arguments(*arguments)))
        if x.shape[0]:
            self.run((*arguments, y), (*x.shape, y.shape[1]))
        return y


class NativeAttentionBackend(NativeFunctions):
    """Arguments and results as `encoder_reference.attention_forward`."""

    forward_symbol = "fff_attention"

    def infer(self, query_key_value: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
        check_attention_arguments(query_key_value, visible)
        texts, tokens, _, heads, size = query_key_value.shape
        y = query_key_value.new_empty((texts, tokens, heads * size))
        if y.numel():
            self.run((query_key_value, visible, y), (texts, tokens, heads, size, bits_of(scaling)))
        return y


class NativeQuantizedAttentionBackend(Int8Products):
    """Arguments and results as `encoder_reference.attention_int8_forward`."""

    forward_symbol = "fff_int8_attention"

    def infer(self, *arguments) -> Tensor:
        call = QuantizedAttentionCall(*arguments)
        check_quantized_attention_arguments(call)
        y = torch.empty_like(call.x, memory_format=torch.contiguous_format)
        texts, tokens, width = call.x.shape
        if y.numel():
            sizes = (texts, tokens, call.heads, width // call.heads, bits_of(call.scaling))
            self.run((*call[:-2], y), sizes)
        return y


class NativeAddNormBackend(NativeFunctions):
    """Arguments and results as `encoder_reference.add_norm_forward`."""

    forward_symbol = "fff_add_norm"
    typed = 1

    def supports(self, x: Tensor, y: Tensor, *call) -> str | None:
        return super().supports(y)

    def infer(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        check_norm_arguments(x, y, weight, bias)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if out.numel():
            self.run((x, y, weight, bias, out), (out.numel() // out.shape[-1], out.shape[-1], bits_of(eps)))
        return out
