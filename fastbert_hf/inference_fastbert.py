# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Encoder layers for inference: one product for query, key and value, and nothing that only training needs.

`replace_layers` and `fuse_layers` put them in place of the layers of an encoder. Trees have a type and linear layers
(attention's, and those of dense feed-forward blocks) have one, out of `DTYPES`:

    float32     the same numbers as before, but for the order of sums.
    bfloat16    weights and inputs. Linear layers: attention too. Trees: their routers see the rounded input.
    int8        weights; inputs are quantised as they come. See quantized_linear.py and quantized_op.py; attention's
                own products stay float32, and so do the routers of trees.

Attention is one op with the linear layers around it (int8) or without them; see encoder_op.py.

The residual stream, norms, embeddings and heads stay float32: they are little of the work, and what is rounded there
reaches every router behind it. docs/serve.md has the numbers.

A state dict has the names of the float model: query, key and value apart.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .backends_fastbert import backend_for
from .encoder_fastbert import FastBertAttention, FastBertDenseFeedForward, FastBertLayer, eager_attention_forward
from .encoder_op import add_norm, attention, attention_int8
from .fff_layer import FastFeedForward
from .leaf_layer import LeafFeedForward
from .quantized_layer import QuantizedFastFeedForward, QuantizedLeafFeedForward
from .quantized_linear import QuantizedLinear

logger = logging.get_logger(__name__)

DTYPES = ("float32", "bfloat16", "int8")
PROJECTIONS = ("query", "key", "value")
JOINED = "query_key_value"
QUANTIZED_OPS = {QuantizedLeafFeedForward: "leaf_trees_int8", QuantizedFastFeedForward: "fff_int8"}


class FusedAttention(FastBertAttention):
    """`FastBertAttention` for inference: one product for query, key and value. Takes over what `attention` holds."""

    def __init__(self, attention: FastBertAttention):
        nn.Module.__init__(self)
        self.config = attention.config
        self.num_heads, self.head_dim, self.scaling = attention.num_heads, attention.head_dim, attention.scaling
        projections = [getattr(attention, name) for name in PROJECTIONS]
        kind = type(projections[0])
        self.query_key_value = QuantizedLinear.joined(*projections) if kind is QuantizedLinear else join(*projections)
        self.output = attention.output
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_merge)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """(B, T, H) -> (B, T, H) and, with eager attention, the weights (B, heads, T, T).

        attention_mask: (B, T) booleans, or (B, 1 or heads, T, T) as in `FastBertAttention`.
        """
        rows, tokens, size = hidden.shape
        implementation = self.config._attn_implementation
        plain = implementation == "sdpa" and (attention_mask is None or attention_mask.dim() == 2)
        if plain and isinstance(self.output, QuantizedLinear):
            layers = (*self.query_key_value.op_arguments(), *self.output.op_arguments())
            return attention_int8(hidden, attention_mask, *layers, self.num_heads, self.scaling), None
        joined = self.query_key_value(hidden).view(rows, tokens, 3, self.num_heads, self.head_dim)
        if plain:
            return self.output(attention(joined, attention_mask, self.scaling)), None
        query, key, value = joined.permute(2, 0, 3, 1, 4).unbind()  # (B, T, 3 H) -> three of (B, heads, T, d)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        mixed, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.output(mixed.reshape(rows, tokens, size)), weights


class FusedLayer(FastBertLayer):
    """`FastBertLayer` for inference. Takes over the modules of `layer`.

    Args:
        layer: the layer. attention_dtype, ffn_dtype: of their inputs; the residual stream keeps its own.
    """

    def __init__(self, layer: FastBertLayer, attention_dtype: torch.dtype, ffn_dtype: torch.dtype):
        nn.Module.__init__(self)
        self.pre_norm = layer.pre_norm
        self.attention_dtype, self.ffn_dtype = attention_dtype, ffn_dtype
        self.attention = FusedAttention(layer.attention)
        self.attention_norm, self.ffn, self.ffn_norm = layer.attention_norm, layer.ffn, layer.ffn_norm

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        if self.pre_norm:
            mixed, _ = self.attention(self.attention_norm(hidden).to(self.attention_dtype), attention_mask, **kwargs)
            hidden = hidden + mixed
            return hidden + self.ffn(self.ffn_norm(hidden).to(self.ffn_dtype))
        mixed, _ = self.attention(hidden.to(self.attention_dtype), attention_mask, **kwargs)
        hidden = residual_norm(self.attention_norm, hidden, mixed)
        return residual_norm(self.ffn_norm, hidden, self.ffn(hidden.to(self.ffn_dtype)))


def residual_norm(norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """norm(x + y), (..., H)."""
    return add_norm(x, y, norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def join(*linears: nn.Linear) -> nn.Linear:
    """One layer whose output is that of layers with one input, side by side."""
    first = linears[0]
    joined = nn.Linear(
        first.in_features,
        sum(linear.out_features for linear in linears),
        first.bias is not None,
        device=first.weight.device,
        dtype=first.weight.dtype,
    )
    for name, parameter in joined.named_parameters():
        parameter.copy_(torch.cat([getattr(linear, name) for linear in linears]))
    return joined


def _split(module: FusedAttention, state_dict: dict[str, Tensor], prefix: str, local_metadata) -> None:
    """Name the parts of query, key and value in a state dict apart."""
    for name in [key for key in state_dict if key.startswith(f"{prefix}{JOINED}.")]:
        end = name.removeprefix(f"{prefix}{JOINED}.")
        for projection, part in zip(PROJECTIONS, state_dict.pop(name).chunk(3)):
            state_dict[f"{prefix}{projection}.{end}"] = part.clone()


def _merge(module: FusedAttention, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """What `_split` took apart."""
    for end in [name.removeprefix(f"{prefix}query.") for name in state_dict if name.startswith(f"{prefix}query.")]:
        parts = [f"{prefix}{projection}.{end}" for projection in PROJECTIONS]
        if all(part in state_dict for part in parts):
            state_dict[f"{prefix}{JOINED}.{end}"] = torch.cat([state_dict.pop(part) for part in parts])


def replace_layers(encoder: nn.Module, dtype: str, linear_dtype: str, empty: bool) -> None:
    """Put layers with int8 weights in place of trees and linear layers, for those types that are "int8".

    Args:
        encoder: a FastBertModel. dtype: of its trees. linear_dtype: of its linear layers.
        empty: whether the new ones are left without values, on the device of the old ones.
    """
    for layer in encoder.layers:
        if linear_dtype == "int8":
            for name in (*PROJECTIONS, "output"):
                setattr(layer.attention, name, _quantized(getattr(layer.attention, name), empty))
        if isinstance(layer.ffn, FastBertDenseFeedForward):
            if linear_dtype == "int8":
                layer.ffn.dense_in = _quantized(layer.ffn.dense_in, empty)
                layer.ffn.dense_out = _quantized(layer.ffn.dense_out, empty)
        elif dtype == "int8":
            norm = layer.ffn_norm if layer.pre_norm else layer.attention_norm
            layer.ffn = _quantized_trees(layer.ffn, norm, empty)


def _quantized(linear: nn.Linear, empty: bool) -> QuantizedLinear:
    if empty:
        bias = linear.bias is not None
        return QuantizedLinear(linear.in_features, linear.out_features, bias, device=linear.weight.device)
    return QuantizedLinear.from_float(linear)


def _quantized_trees(trees: FastFeedForward | LeafFeedForward, norm: nn.LayerNorm, empty: bool) -> nn.Module:
    """Trees with int8 weights; `norm` gives their input, whose columns are as large as it makes them."""
    is_leaf = isinstance(trees, LeafFeedForward)
    kind = QuantizedLeafFeedForward if is_leaf else QuantizedFastFeedForward
    if empty:
        widths = (trees.leaf_width,) if is_leaf else ()
        sizes = (trees.in_features, trees.out_features, trees.depth, *widths, trees.trees, trees.activation)
        return kind(*sizes, trees.bias_in is not None, device=trees.weight_in.device)
    if is_leaf:
        return kind.from_float(trees, input_range=norm.bias.abs() + 3 * norm.weight.abs())
    return kind.from_float(trees)


def fuse_layers(encoder: nn.Module, dtype: str, linear_dtype: str) -> None:
    """Put `FusedLayer` in place of the layers of an encoder; those in int8 have their int8 weights already.

    Args: as `replace_layers`.
    """
    for number, layer in enumerate(encoder.layers):
        ffn_dtype = linear_dtype if isinstance(layer.ffn, FastBertDenseFeedForward) else dtype
        encoder.layers[number] = FusedLayer(
            layer, _set_dtype(layer.attention, linear_dtype), _set_dtype(layer.ffn, ffn_dtype)
        ).eval()


def _set_dtype(module: nn.Module, dtype: str) -> torch.dtype:
    """Round the weights of a module to bfloat16 where that is wanted; returns the type of its input."""
    if dtype != "bfloat16":
        return torch.float32
    module.to(torch.bfloat16)
    if not bfloat16_products() and not isinstance(module, (FastFeedForward, LeafFeedForward)):
        module.to(torch.float32)
        return torch.float32
    return torch.bfloat16


def bfloat16_products() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32."""
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):  # where PyTorch's own test is content with less
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_plain(encoder: nn.Module) -> None:
    """Raises ValueError where an encoder holds adapters or other layers that are not its own."""
    for name, module in encoder.layers.named_modules():
        linear = any(name.endswith(f"attention.{end}") for end in (*PROJECTIONS, "output"))
        if linear and type(module) is not nn.Linear:
            raise ValueError(
                f"layers.{name} is a {type(module).__name__}; expected torch.nn.Linear: merge adapters first"
            )


def warn_of_slow_parts(encoder: nn.Module, linear_dtype: str) -> None:
    """Warn, once a process, of weights for whose products this machine has nothing fast.

    Args: encoder: after `fuse_layers`. linear_dtype: as there.
    """
    if linear_dtype == "int8" and backend_for("linear_int8", torch.empty(1, 1)).name == "reference":
        logger.warning_once(
            "int8 linear layers: no compiled kernel of the op linear_int8 runs here (`fastbert kernels` says why); "
            "plain PyTorch computes them, slowly. linear_dtype='float32' is faster here"
        )
    if linear_dtype == "bfloat16" and not bfloat16_products():
        logger.warning_once(
            "bfloat16 linear layers: this CPU has no products of bfloat16; the rounded weights compute in float32"
        )
    for layer in encoder.layers:
        family = QUANTIZED_OPS.get(type(layer.ffn))
        if family is None:
            continue
        x, trees = torch.empty(1, layer.ffn.in_features), layer.ffn
        call = (x, trees.weight_in, trees.weight_out, trees.trees, trees.depth, trees.activation)
        if backend_for(family, *call).name == "reference":
            logger.warning_once(
                f"int8 trees: no compiled kernel of the op {family} runs here (`fastbert kernels` says why); plain "
                "PyTorch computes them, slowly. dtype='float32' is faster here"
            )


__all__ = ["FusedAttention", "FusedLayer"]
