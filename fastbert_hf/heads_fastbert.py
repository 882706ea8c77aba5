# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""The parts of FastBERT's heads: MLM head and pooler. Sizes: B batch, T tokens, N = B*T, H hidden, V vocabulary."""

import torch
from torch import Tensor, nn

from .configuration_fastbert import FastBertConfig
from .encoder_fastbert import TiedWeightOwner, visible_keys
from .fff_reference import ACTIVATIONS


class FastBertMLMHead(TiedWeightOwner):
    """Optional transform, then the decoder whose weight is the word embedding."""

    tied_child = "decoder"

    def __init__(self, config: FastBertConfig):
        super().__init__()
        self.transform = config.mlm_head_transform
        if self.transform:
            self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
            self.activation = ACTIVATIONS[config.mlm_head_act or config.hidden_act]
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        if self.transform:
            hidden = self.norm(self.activation(self.dense(hidden)))
        return self.decoder(hidden)


def labelled_positions(labels: Tensor, share: float) -> Tensor:
    """Indices of the labelled positions of flat labels (N,), -100 meaning none.

    While compiling, shapes must not depend on data: then exactly round(share * N) indices are returned, labelled ones
    first, and more labels than that are an error at run time.
    """
    labelled = labels != -100
    if not torch.compiler.is_compiling():
        return labelled.nonzero().squeeze(1)
    quota = max(1, round(share * labels.shape[0]))
    torch._assert_async(
        labelled.sum() <= quota,
        "more labels in the batch than sparse_prediction allows; raise sparse_prediction or set it to 0",
    )
    return labelled.int().argsort(descending=True, stable=True)[:quota]


class FastBertPooler(nn.Module):
    """One vector a sequence: pooling, optional dense layer, activation, dropout."""

    def __init__(self, config: FastBertConfig):
        super().__init__()
        self.pooling = config.classifier_pooling
        head_dim = config.classifier_head_dim
        self.output_dim = head_dim or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, head_dim) if head_dim else nn.Identity()
        self.activation = torch.tanh if config.classifier_activation == "tanh" else torch.relu
        self.dropout = nn.Dropout(config.classifier_dropout)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T, H), and the (B, T) mask that "mean" pooling needs -> (B, output_dim)."""
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "max":
            pooled = hidden.amax(dim=1)
        elif self.pooling == "lse":
            pooled = hidden.logsumexp(dim=1)
        elif self.pooling == "mean_all" or attention_mask is None:
            pooled = hidden.mean(dim=1)
        else:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"classifier_pooling 'mean' needs an attention_mask (B, T); got {attention_mask.dim()} dimensions"
                )
            visible = visible_keys(attention_mask).unsqueeze(-1)  # (B, T, 1)
            pooled = hidden.masked_fill(~visible, 0).sum(dim=1) / visible.sum(dim=1)
        return self.dropout(self.activation(self.dense(pooled)))
