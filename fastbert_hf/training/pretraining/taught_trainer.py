"""Pretraining with a teacher: beside the masked tokens, a model learns what a trained one says about them."""

from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from fastbert_hf.data.tokenizer import load_tokenizer, tokenizer_digest
from fastbert_hf.modeling_fastbert import FastBertForMaskedLM
from fastbert_hf.training.budget_trainer import BudgetTrainer
from fastbert_hf.training.checkpoints import check_weights
from fastbert_hf.training.teaching import divergence, without_dropout


def load_pretraining_teacher(
    path: str | None, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> FastBertForMaskedLM | None:
    """A teacher for pretraining: frozen, without dropout; None where there is no path.

    Args:
        path: folder or Hub name of a FastBERT with its head for masked tokens and its tokenizer.
        tokenizer: of the run. vocab_size: V of the student.

    Raises:
        ValueError: it cannot be loaded, is of another kind, or has another tokenizer or another V.
    """
    if path is None:
        return None
    try:
        check_weights(path)
        teacher = AutoModelForMaskedLM.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"no teacher can be loaded from {path!r}: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(teacher, FastBertForMaskedLM):
        raise ValueError(f"the teacher in {path!r} is a {type(teacher).__name__}; expected a FastBERT")
    if teacher.config.vocab_size != vocab_size:
        raise ValueError(f"the teacher in {path!r} has a vocabulary of {teacher.config.vocab_size}, not {vocab_size}")
    if tokenizer_digest(load_tokenizer(path)) != tokenizer_digest(tokenizer):
        raise ValueError(f"the teacher in {path!r} has another tokenizer than this run")
    return without_dropout(teacher).requires_grad_(False)


class TaughtTrainer(BudgetTrainer):
    """A `BudgetTrainer` whose loss is (1 - w) * cross-entropy + w * divergence from a teacher at masked tokens.

    The divergence is Kullback-Leibler's, in nats, a mean over the predicted positions of a microbatch. Held-out
    losses are the cross-entropy alone. Source: arXiv 1503.02531, at temperature 1.

    Args:
        teacher: of `load_pretraining_teacher`; it is moved to the device of the run.
        teacher_weight: w, 0 to 1.
        **kwargs: for `BudgetTrainer`.
    """

    HOOKS = (*BudgetTrainer.HOOKS, "compute_loss")

    def __init__(self, *, teacher: PreTrainedModel, teacher_weight: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.teacher_weight = teacher_weight
        self.teacher = teacher.to(self.args.device)
        self.teacher.config.sparse_prediction = self.model.config.sparse_prediction
        self.teacher.train()  # it then computes the predicted positions alone, as the student does

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a microbatch; in evaluations, the cross-entropy."""
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            with torch.no_grad():
                wanted = self.teacher(**inputs).logits
            own = outputs.logits
            if own.dim() == 3:  # without sparse prediction: (B, T, V) -> (predicted positions, V)
                predicted = inputs["labels"] >= 0
                own, wanted = own[predicted], wanted[predicted]
            taught = divergence(own.float(), wanted.float())
            loss = (1 - self.teacher_weight) * loss + self.teacher_weight * taught
        return (loss, outputs) if return_outputs else loss
