"""What a student learns: the teacher's hidden states, layer by layer, and what the teacher is for.

Every part is a mean of squares or a divergence that is zero where student and teacher agree.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from fastbert_hf.data.masking import IGNORE_INDEX
from fastbert_hf.modeling_fastbert import (
    FastBertForMaskedLM,
    FastBertForQuestionAnswering,
    FastBertForSequenceClassification,
    FastBertForTokenClassification,
    FastBertModel,
)
from fastbert_hf.training.teaching import divergence

# the parts of the loss, in words
WORDS = {
    "hidden_error": "hidden-state error",
    "cosine_distance": "1 - cosine of the embeddings",
    "similarity_error": "squared error of similarities",
    "divergence": "divergence of the head, nats",
    "score_error": "squared error of the score",
    "label_loss": "loss on the labels",
}
# What each part counts in the loss. Where the embedding had ten times the weight of the hidden states, both ended
# further from the teacher's in students of MiniLM (docs/log.md).
WEIGHTS = {
    "hidden_error": 1.0,
    "cosine_distance": 0.1,
    "similarity_error": 0.1,
    "divergence": 1.0,
    "score_error": 1.0,
    "label_loss": 0.0,
}

Embed = Callable[[Tensor, Tensor], Tensor]  # (B, T, H) and the mask (B, T) -> (B, E)


def visible_rows(hidden: Tensor, mask: Tensor) -> Tensor:
    """The rows of tokens that are not padding: (B, T, H), (B, T) -> (N, H)."""
    return hidden[mask.bool()]


class HiddenScale:
    """Mean and variance of a teacher's hidden states, for each layer and dimension.

    Args:
        layers: how many. width: H.
    """

    def __init__(self, layers: int, width: int):
        self._count = 0
        self._sum = torch.zeros(layers, width, dtype=torch.float64)
        self._squares = torch.zeros(layers, width, dtype=torch.float64)

    def add(self, states: Sequence[Tensor], mask: Tensor) -> None:
        """Count a batch: one (B, T, H) for each layer."""
        for number, hidden in enumerate(states):
            rows = visible_rows(hidden, mask).double().cpu()
            self._sum[number] += rows.sum(0)
            self._squares[number] += rows.square().sum(0)
        self._count += int(mask.sum())

    def variance(self) -> Tensor:
        """(layers, H) float32; a dimension that hardly varies counts as if it varied a hundredth of the median."""
        mean = self._sum / self._count
        variance = self._squares / self._count - mean.square()
        least = 0.01 * variance.median(dim=1, keepdim=True).values
        return variance.clamp(min=1e-12).maximum(least).float()


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, variance: Tensor) -> Tensor:
    """Mean squared difference in units of the teacher's variance, of each layer: (layers,).

    Args:
        student, teacher: one (B, T, H) for each layer. mask: (B, T), zero at padding.
        variance: (layers, H) of the teacher's states. 1 is the error of a constant.
    """
    errors = []
    for own, wanted, size in zip(student, teacher, variance, strict=True):
        difference = visible_rows(own, mask) - visible_rows(wanted, mask)
        errors.append((difference.square() / size).mean())
    return torch.stack(errors)


def embedding_parts(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """How far embeddings (B, E) are from the teacher's: one minus the cosine, and the error of all similarities."""
    own, wanted = (nn.functional.normalize(embeddings, dim=-1) for embeddings in (student, teacher))
    similarities = own @ own.T - wanted @ wanted.T  # (B, B)
    return {"cosine_distance": 1 - (own * wanted).sum(-1).mean(), "similarity_error": similarities.square().mean()}


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, or squared error where labels are scores, over the texts that have a label: ().

    Args:
        logits: (B, C), or (B, 1) of scores. labels: (B,) int64 with `IGNORE_INDEX`, or float with NaN, for none. Zero
            without any.
    """
    if labels.is_floating_point():
        known = labels.isfinite()
        return (logits[known, 0] - labels[known]).square().sum() / max(1, int(known.sum()))
    total = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / max(1, int((labels != IGNORE_INDEX).sum()))


def head_parts(
    model: nn.Module, student: ModelOutput, teacher: ModelOutput, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """How far a head's outputs are from the teacher's; nothing for a model without head.

    Args:
        model: the student, whose class says what its outputs are.
        batch: `attention_mask` (B, T); `masked` (B, T) where tokens were masked, for masked language models.
    """
    if isinstance(model, FastBertForMaskedLM):
        return {"divergence": divergence(student.logits[batch["masked"]], teacher.logits[batch["masked"]])}
    if isinstance(model, FastBertForTokenClassification):
        visible = batch["attention_mask"].bool()
        return {"divergence": divergence(student.logits[visible], teacher.logits[visible])}
    if isinstance(model, FastBertForQuestionAnswering):
        hide = ~batch["attention_mask"].bool()
        both = [
            divergence(own.masked_fill(hide, -1e4), wanted.masked_fill(hide, -1e4))
            for own, wanted in (
                (student.start_logits, teacher.start_logits),
                (student.end_logits, teacher.end_logits),
            )
        ]
        return {"divergence": sum(both) / 2}
    if isinstance(model, FastBertForSequenceClassification):
        if model.config.num_labels == 1 or model.config.problem_type == "regression":
            return {"score_error": (student.logits - teacher.logits).square().mean()}
        if model.config.problem_type == "multi_label_classification":
            own, wanted = (  # each label is a distribution of its own: (B, C, 2)
                torch.stack([outputs.logits, torch.zeros_like(outputs.logits)], -1) for outputs in (student, teacher)
            )
            return {"divergence": divergence(own.flatten(0, 1), wanted.flatten(0, 1))}
        return {"divergence": divergence(student.logits, teacher.logits)}
    if isinstance(model, FastBertModel):
        return {}
    raise ValueError(
        f"{type(model).__name__} cannot be distilled; expected the encoder alone, or with one of the "
        "heads for masked language modelling, sequence or token classification, question answering"
    )
