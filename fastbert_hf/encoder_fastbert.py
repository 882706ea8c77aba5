# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""The parts of a FastBERT encoder: embeddings, attention, feed-forward, layer.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

import math
import warnings

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_fastbert import FastBertConfig
from .fff_layer import FastFeedForward
from .fff_reference import ACTIVATIONS
from .inputs_fastbert import check_inputs, check_rows, look_up
from .leaf_layer import LeafFeedForward


def sinusoidal_positions(max_positions: int, hidden_size: int) -> Tensor:
    """Interleaved sines and cosines (max_positions, H), float32: [p, 2k] = sin(p w_k), [p, 2k+1] = cos(p w_k)."""
    frequencies = torch.exp(torch.arange(0, hidden_size, 2, dtype=torch.float32) * (-math.log(10000.0) / hidden_size))
    angles = torch.arange(max_positions, dtype=torch.float32).unsqueeze(1) * frequencies  # (T, H/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # (T, H/2, 2) -> (T, H)


class TiedWeightOwner(nn.Module):
    """A module that owns one end of a tied weight; it warns of an adapter there.

    Merging LoRA and its relatives changes a weight in place, at both ends of the tie, where the adapter was at one.
    """

    tied_child = ""  # the submodule that has the weight
    tied_by: FastBertConfig | None = None  # set by a model that ties it to another module's

    def __setattr__(self, name, value):
        if name == self.tied_child and self.tied_by is not None and self.tied_by.tie_word_embeddings:
            adapted = hasattr(value, "base_layer") and not hasattr(value, "trainable_tokens_delta")  # PEFT ties these
            if adapted:
                warnings.warn(
                    f"the weight of {name} is tied and an adapter was put on it: it trains and can be saved, but "
                    "merging it changes the word embeddings and the decoder alike and gives another model. Untie "
                    "them before the adapter is made: set model.config.tie_word_embeddings to False and "
                    "model.mlm_head.decoder.weight to a torch.nn.Parameter of a clone of it",
                    stacklevel=2,
                )
        super().__setattr__(name, value)


class FastBertEmbeddings(TiedWeightOwner):
    """Word + position (+ token type) embeddings, norm, dropout."""

    tied_child = "word_embeddings"

    def __init__(self, config: FastBertConfig):
        super().__init__()
        self.max_positions, self.hidden_size = config.max_position_embeddings, config.hidden_size
        # the padding token whose positions are not counted, None where all are
        self.uncounted = config.pad_token_id if config.position_numbering == "non_padding" else None
        self.first_position, self.longest_sequence = config.first_position, config.longest_sequence
        self.sinusoidal = config.position_embedding_type == "scaled_sinusoidal"
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if self.sinusoidal:
            self.position_scale = nn.Parameter(torch.full((1,), config.hidden_size**-0.5))
            positions = sinusoidal_positions(self.max_positions, config.hidden_size)
            self.register_buffer("positions", positions, persistent=False)
        else:
            self.position_embeddings = nn.Embedding(
                self.max_positions, config.hidden_size, padding_idx=self.uncounted
            )
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        else:
            self.token_type_embeddings = None
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.embedding_norm else nn.Identity()
        )
        dropout = config.embedding_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids (B, T), or inputs_embeds (B, T, H) in place of the word embeddings -> (B, T, H).

        position_ids and token_type_ids: (T,) or (B, T).
        """
        check_inputs(input_ids, inputs_embeds, self.hidden_size)
        if inputs_embeds is None:  # (B, T) -> (B, T, H)
            inputs_embeds = look_up("input_ids", self.word_embeddings, input_ids, "vocab_size")
        num_rows, num_tokens = inputs_embeds.shape[:2]
        if num_tokens > self.longest_sequence:
            less = "" if self.uncounted is None else " - pad_token_id - 1"
            raise ValueError(
                f"the sequence has {num_tokens} tokens; this model has positions for {self.longest_sequence} "
                f"(max_position_embeddings{less}): truncate the input"
            )
        if position_ids is not None:
            check_rows("position_ids", position_ids, num_rows, num_tokens)
        elif self.uncounted is not None:
            position_ids = self.count_positions(input_ids, num_tokens, inputs_embeds.device)
        hidden = inputs_embeds
        if self.token_type_embeddings is not None:  # before positions, as in BERT: the sum rounds alike
            if token_type_ids is None:
                token_type_ids = torch.zeros((num_rows, num_tokens), dtype=torch.long, device=hidden.device)
            check_rows("token_type_ids", token_type_ids, num_rows, num_tokens)
            hidden = hidden + look_up("token_type_ids", self.token_type_embeddings, token_type_ids, "type_vocab_size")
        if self.sinusoidal:
            positions = (
                self.positions[:num_tokens]
                if position_ids is None
                else look_up("position_ids", self.positions, position_ids, "max_position_embeddings")
            )
            hidden = hidden + self.position_scale * positions.to(hidden.dtype)
        else:
            if position_ids is None:
                position_ids = torch.arange(num_tokens, device=hidden.device)
            table = self.position_embeddings
            hidden = hidden + look_up("position_ids", table, position_ids, "max_position_embeddings")
        return self.dropout(self.norm(hidden))

    def count_positions(self, input_ids: Tensor | None, num_tokens: int, device: torch.device) -> Tensor:
        """Positions from `first_position` on for tokens other than padding, whose position is one less.

        Args: input_ids (B, T), or None where embeddings are given: then every token is counted.
        Returns: (B, T), or (T,) without input_ids.
        Source: fairseq's positions, as in RoBERTa.
        """
        if input_ids is None:
            return torch.arange(num_tokens, device=device) + self.first_position
        counted = (input_ids != self.uncounted).long()
        return counted.cumsum(dim=1) * counted + self.uncounted


def visible_keys(attention_mask: Tensor) -> Tensor:
    """Boolean mask of the keys a query may see; a row that sees none sees all, as if unmasked.

    Args: attention_mask (B, T) or (B, T_query, T_key), nonzero where visible.
    """
    visible = attention_mask.bool()
    return visible | ~visible.any(dim=-1, keepdim=True)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention spelled out: query, key, value (B, heads, T, d) -> output (B, T, heads, d), weights (B, heads, T, T).

    attention_mask broadcasts to (B, heads, T, T): boolean (True is visible) or additive.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class FastBertAttention(nn.Module):
    """Bidirectional multi-head self-attention with its output projection."""

    is_causal = False

    def __init__(self, config: FastBertConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """(B, T, H) -> (B, T, H) and, with eager attention, the weights (B, heads, T, T)."""
        split = (*hidden.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (
            project(hidden).view(split).transpose(1, 2)  # (B, T, H) -> (B, heads, T, d)
            for project in (self.query, self.key, self.value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.output(mixed.reshape(hidden.shape)), weights  # (B, T, heads, d) -> (B, T, H)


class FastBertDenseFeedForward(nn.Module):
    """The plain feed-forward block, optionally gated: the baseline of the trees."""

    def __init__(self, config: FastBertConfig):
        super().__init__()
        self.gated = config.dense_gated
        self.activation = ACTIVATIONS[config.hidden_act]
        width = config.intermediate_size
        self.dense_in = nn.Linear(config.hidden_size, 2 * width if self.gated else width, bias=config.use_bias)
        self.dense_out = nn.Linear(width, config.hidden_size, bias=config.use_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        hidden = self.dense_in(hidden)
        if self.gated:
            value, gate = hidden.chunk(2, dim=-1)
            return self.dense_out(value * self.activation(gate))
        return self.dense_out(self.activation(hidden))


def feed_forward(config: FastBertConfig) -> nn.Module:
    """The feed-forward block that the configuration asks for: dense, leaf trees, or trees of single neurons."""
    if config.ffn_type == "dense":
        return FastBertDenseFeedForward(config)
    if config.fff_leaf_width is not None:
        return LeafFeedForward(
            config.hidden_size,
            config.hidden_size,
            config.fff_depth,
            config.fff_leaf_width,
            config.fff_trees,
            config.hidden_act,
            config.fff_bias,
            initializer_range=config.initializer_range,
        )
    return FastFeedForward(
        config.hidden_size,
        config.hidden_size,
        config.fff_depth,
        config.fff_trees,
        config.hidden_act,
        config.fff_bias,
        initializer_range=config.initializer_range,
    )


class FastBertLayer(GradientCheckpointingLayer):
    """One encoder layer: attention and feed-forward, each with a norm, dropout and a residual connection."""

    def __init__(self, config: FastBertConfig):
        super().__init__()
        self.pre_norm = config.norm_scheme == "pre"
        self.attention = FastBertAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = feed_forward(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        if self.pre_norm:
            mixed, _ = self.attention(self.attention_norm(hidden), attention_mask, **kwargs)
            hidden = hidden + self.dropout(mixed)
            return hidden + self.dropout(self.ffn(self.ffn_norm(hidden)))
        mixed, _ = self.attention(hidden, attention_mask, **kwargs)
        hidden = self.attention_norm(hidden + self.dropout(mixed))
        return self.ffn_norm(hidden + self.dropout(self.ffn(hidden)))
