"""Calls of the ops around an encoder's feed-forward blocks, and how closely two correct backends agree on them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert_hf.backends_fastbert import BACKENDS
from fastbert_hf.quantized_linear import QuantizedLinear

VISIBLE = ("all", "some", "one", "none")  # of the keys


@dataclass
class Call:
    """One call of an op, its arguments in their order."""

    op: str
    arguments: tuple

    def run(self, backend: str = "native") -> Tensor:
        return BACKENDS[self.op][backend].infer(*self.arguments)

    def rows(self, begin: int, end: int) -> "Call":
        """The same for some of the texts, or rows."""
        count = 1 if self.op == "linear_int8" else 2  # arguments that have a row for each: x and `visible` or y
        batched = [t if t is None else t[begin:end] for t in self.arguments[:count]]
        return Call(self.op, (*batched, *self.arguments[count:]))


def visible_keys(kind: str, texts: int, tokens: int) -> Tensor | None:
    if kind == "all":
        return None
    visible = torch.rand(texts, tokens) < (0.6 if kind == "some" else 0)
    if kind == "one":
        visible[:, tokens // 2 : tokens // 2 + 1] = True
    return visible


def attention_call(texts, tokens, heads, size, visible="some", dtype=torch.float32, seed=0) -> Call:
    torch.manual_seed(seed)
    x = (2 * torch.randn(texts, tokens, 3, heads, size)).to(dtype)
    return Call("attention", (x, visible_keys(visible, texts, tokens), size**-0.5))


def quantized_linear(inputs: int, outputs: int, bias: bool = True) -> QuantizedLinear:
    linear = torch.nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        linear.weight.normal_(std=2 * inputs**-0.5)
    return QuantizedLinear.from_float(linear)


def linear_call(rows, inputs, outputs, bias=True, dtype=torch.float32, seed=0) -> Call:
    torch.manual_seed(seed)
    layer = quantized_linear(inputs, outputs, bias)
    return Call("linear_int8", ((3 * torch.randn(rows, inputs)).to(dtype), *layer.op_arguments()))


def quantized_attention_call(texts, tokens, heads, size, visible="some", dtype=torch.float32, seed=0) -> Call:
    torch.manual_seed(seed)
    width = heads * size
    layers = quantized_linear(width, 3 * width), quantized_linear(width, width)
    x = torch.randn(texts, tokens, width).to(dtype)
    parameters = (*layers[0].op_arguments(), *layers[1].op_arguments())
    return Call("attention_int8", (x, visible_keys(visible, texts, tokens), *parameters, heads, size**-0.5))


def norm_call(rows, width, dtype=torch.float32, seed=0) -> Call:
    torch.manual_seed(seed)
    x, y = 3 * torch.randn(rows, width) + 1, torch.randn(rows, width).to(dtype)
    return Call("add_norm", (x, y, torch.randn(width), torch.randn(width), 1e-5))


def exact_attention(query_key_value: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """In float64, with a mask in place of weights."""
    query, key, value = query_key_value.double().permute(2, 0, 3, 1, 4).unbind()
    scores = query @ key.mT * scaling
    if visible is not None:
        seen = visible | ~visible.any(1, keepdim=True)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def check_attention(call: Call) -> None:
    y, expected = call.run(), exact_attention(*call.arguments)
    assert y.dtype == call.arguments[0].dtype
    rtol = 2e-6 if y.dtype == torch.float32 else 2.0**-8
    size = call.arguments[0].double().abs().amax() if y.numel() else 0.0
    assert ((y.double() - expected).abs() <= rtol * expected.abs() + 4e-6 * size).all()


def check_norm(call: Call) -> None:
    x, y, weight, bias, eps = call.arguments
    total = x.double() + y.double()
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()
    torch.testing.assert_close(call.run().double(), expected, rtol=1e-5, atol=2e-5)


def parts_of(call: Call) -> Tensor:
    """What `attention_int8` computes, by the three ops that it consists of."""
    x, visible, *layers, heads, scaling = call.arguments
    texts, tokens, width = x.shape
    joined = Call("linear_int8", (x.flatten(0, 1), *layers[:4])).run().view(texts, tokens, 3, heads, width // heads)
    mixed = Call("attention", (joined, visible, scaling)).run()
    return Call("linear_int8", (mixed.flatten(0, 1), *layers[4:])).run().view(x.shape)
