"""The trainer of distillation: a teacher beside the student, and errors that a person understands in the log."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.modeling_outputs import ModelOutput

from fastbert_hf.training.budget import falling
from fastbert_hf.training.budget_trainer import BudgetTrainer
from fastbert_hf.training.distillation.objective import (
    WEIGHTS,
    Embed,
    embedding_parts,
    head_parts,
    hidden_error,
    label_loss,
)
from fastbert_hf.training.distillation.student import Student
from fastbert_hf.training.distillation.texts import NOT_INPUTS, as_device, first_item


class DistillationTrainer(BudgetTrainer):
    """Trains a student to do what its teacher does.

    Args:
        student: what learns. teacher: dense, of the same class.
        variance: (L, H) of the teacher's hidden states, of all its layers.
        embed: what makes sentence embeddings of the last hidden states, or None.
        weights: of the parts of the loss; those that are not named have the weights of `WEIGHTS`.
        teacher_dtype: of the teacher's products while the student trains. What is measured is measured in float32.
        **kwargs: for `BudgetTrainer`; the items of its data sets are batches.
    """

    rate_at = staticmethod(falling)  # the student begins near its teacher

    def __init__(
        self,
        *,
        student: Student,
        teacher: nn.Module,
        variance: Tensor,
        embed: Embed | None = None,
        weights: Mapping[str, float] | None = None,
        teacher_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ):
        super().__init__(model=student.model, data_collator=first_item, batch_size=1, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.teacher_layers = student.teacher_layers
        self.variance = variance.to(self.args.device)
        self.embed = embed
        self.weights = WEIGHTS | dict(weights or {})
        self.teacher_dtype = teacher_dtype
        self._logged: dict[str, list[Tensor]] = defaultdict(list)

    @torch.no_grad()
    def _taught(self, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> ModelOutput:
        """What the teacher makes of inputs with products of a dtype, as float32."""
        from accelerate.utils import convert_to_fp32

        reduced = dtype != torch.float32
        with torch.autocast(self.args.device.type, dtype if reduced else None, enabled=reduced):
            return convert_to_fp32(self.teacher(**inputs, output_hidden_states=True))

    def parts(
        self, model: nn.Module, batch: Mapping[str, Tensor], teacher_dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The error of each layer's hidden states (layers,), and the other parts of the loss."""
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        wanted = self._taught(inputs, teacher_dtype)
        own = model(**inputs, output_hidden_states=True)
        mask = batch["attention_mask"]
        states = [wanted.hidden_states[1 + number] for number in self.teacher_layers]  # the first is the embedding
        layers = hidden_error(own.hidden_states[1:], states, mask, self.variance[self.teacher_layers])
        parts = head_parts(self.model, own, wanted, batch)  # not the compiled or wrapped one
        if "labels" in batch:
            parts["label_loss"] = label_loss(own.logits, batch["labels"])
        if self.embed is not None:
            parts |= embedding_parts(self.embed(own[0], mask), self.embed(wanted[0], mask))
        return layers, parts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of the parts."""
        layers, parts = self.parts(model, inputs, self.teacher_dtype)
        parts = {"hidden_error": layers.mean(), **parts}
        for name, value in parts.items():
            self._logged[name].append(value.detach())
        loss = self.weighted(parts)
        return (loss, parts) if return_outputs else loss

    def weighted(self, parts: Mapping[str, Any]) -> Any:
        """The sum of the parts of the loss, each with its weight."""
        return sum(self.weights[name] * value for name, value in parts.items())

    def measured_loss(self, metrics: Mapping[str, Any], prefix: str = "eval") -> float:
        """The loss that `measure` found."""
        layers = metrics[f"{prefix}_hidden_error_by_layer"]
        parts = {name: metrics[f"{prefix}_{name}"] for name in self.weights if f"{prefix}_{name}" in metrics}
        return float(self.weighted({**parts, "hidden_error": sum(layers) / len(layers)}))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, means since the last line."""
        if "loss" in logs:
            logs |= {name: round(torch.stack(values).mean().item(), 5) for name, values in self._logged.items()}
            self._logged.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix="eval"):
        """The parts over held-out text, and `hidden_error_by_layer`; the log names the last layer's."""
        return self.measure(self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)

    @torch.no_grad()
    def measure(self, batches: Dataset | Sequence[dict[str, Tensor]], prefix: str = "eval") -> dict[str, Any]:
        """Means over batches of what `parts` gives."""
        was_training = self.model.training
        self.model.eval()
        layers, parts = [], defaultdict(list)
        for number in range(len(batches)):
            by_layer, others = self.parts(self.model, as_device(batches[number], self.args.device))
            layers.append(by_layer)
            for name, value in others.items():
                parts[name].append(value)
        self.model.train(was_training)
        mean = torch.stack(layers).mean(0)
        metrics = {f"{prefix}_hidden_error": mean[-1].item()}
        metrics |= {f"{prefix}_{name}": torch.stack(values).mean().item() for name, values in parts.items()}
        self.log(dict(metrics))
        return {**metrics, f"{prefix}_hidden_error_by_layer": [round(error, 5) for error in mean.tolist()]}
