"""Fine-tuning a sequence classifier on one GLUE-format task with one seed."""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from fastbert_hf.data.glue import Split, Task, TaskData
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.files import write_text
from fastbert_hf.training.checkpoints import check_checkpoint, find_checkpoint, remove_checkpoints
from fastbert_hf.training.figures import plot_confusion, plot_learning_curve
from fastbert_hf.training.glue.classifier import Head, ModelArguments, fit_head, load_classifier, restrict_training
from fastbert_hf.training.glue.metrics import compute, decode_predictions, majority_baseline
from fastbert_hf.training.glue.options import DataTrainingArguments, check_options_together, load_task
from fastbert_hf.training.glue.settings import (
    PREDICTIONS,
    PUSHED,
    SUMMARY,
    Work,
    checkpoint_content,
    find_work,
    record_start,
    repository,
    run_settings,
)
from fastbert_hf.training.glue.submission import write_predictions
from fastbert_hf.training.leaf_balance import add_balance, check_balance
from fastbert_hf.training.publishing import add_hub_files, check_push, publish, write_card, write_recipe
from fastbert_hf.training.runs import (
    check_fit,
    check_options,
    disable_pin_memory_on_cpu,
    is_main_process,
    save_model,
    train,
    write_summary,
)
from fastbert_hf.training.trainer_hooks import check_hooks


def tokenize_split(split: Split, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, pad: bool):
    """Tokenize a split.

    Args:
        split: S examples.
        tokenizer: how.
        max_seq_length: cut to this length, the longer text of a pair first.
        pad: pad to that length here; otherwise the collator pads each batch.

    Returns:
        A `datasets.Dataset` of S rows: the tokenizer's columns and, unless it is a test split, `labels`.
    """
    from datasets import Dataset

    encoded = tokenizer(
        *split.texts, truncation=True, max_length=max_seq_length, padding="max_length" if pad else False
    )
    return Dataset.from_dict({**encoded, **({"labels": split.labels} if split.labels else {})})


def finetune(
    model_options: ModelArguments,
    data: DataTrainingArguments,
    args: TrainingArguments,
    task_data: TaskData | None = None,
    name: str | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fine-tune and evaluate a classifier on one task, with the seed of `args`.

    Metrics are those of the last epoch, unless `args` asks for the best checkpoint. The output folder receives model,
    tokenizer, card, pictures of learning curve and confused classes, predictions if wanted, `summary.json`, and
    `settings.json`. If it holds this run already, only the steps that are missing are done, with the model that was
    trained; an interrupted training goes on from its last checkpoint.

    Args:
        model_options: one model, and which of its weights are trained.
        data: one task.
        args: optimisation, as for every Trainer; `do_train`, `do_eval` and `do_predict` choose the steps.
        task_data: the task's data, if it is loaded already.
        name: what the summary calls the model; default: its path or Hub name.

    Returns:
        The fine-tuned model, and the summary: metrics and majority baseline per validation split, counts, times.

    Raises:
        ValueError: for anything wrong in the options or the data, or an output folder of another run, before
            training starts.
    """
    _check_one(model_options, data, args)
    args = copy.copy(args)
    check_push(args)
    checkpoint = find_checkpoint(args, data.overwrite_output_dir)
    task_data = task_data or load_task(data, next(iter(data.task_name), None), args)
    source = model_options.model_name_or_path[0]
    tokenizer = load_tokenizer(model_options.tokenizer_name or source, **model_options.hub)
    head = fit_head(model_options, source, task_data.task)
    check_fit(head.config, tokenizer, data.max_seq_length)
    check_checkpoint(checkpoint, head.config)
    content = checkpoint_content(model_options, source, tokenizer)
    settings = run_settings(model_options, data, args, content, task_data)
    work = find_work(args, settings, task_data, data.overwrite_output_dir)
    if work.summary is not None and args.do_train:  # what is left is done with the model that was trained
        model_options = ModelArguments([args.output_dir], trust_remote_code=model_options.trust_remote_code)
        tokenizer, head = load_tokenizer(args.output_dir), fit_head(model_options, args.output_dir, task_data.task)
    args = _with_early_stopping(args, data.early_stopping_patience)
    disable_pin_memory_on_cpu(args)
    set_seed(args.seed)
    model = load_classifier(model_options, model_options.model_name_or_path[0], head)
    check_balance(data.balance_leaves, model)
    prepared = _TaskEncoding(tokenizer, task_data.task, head, data)
    trainer = _trainer(restrict_training(model, model_options), args, task_data, prepared, work.train)
    if is_main_process(args) and not work.is_done:
        record_start(args, work)
    about = {"model": name or source, "task": task_data.task.name, "seed": args.seed}
    summary = work.summary or {**about, "train_examples": len(task_data.train or ())}
    return _run(trainer, prepared, task_data, work, summary, checkpoint)


def _run(
    trainer: Trainer,
    prepared: "_TaskEncoding",
    task_data: TaskData,
    work: Work,
    summary: dict[str, Any],
    checkpoint: str | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Do the work; the model, and the summary with what has been added."""
    args = trainer.args
    add_hub_files(trainer)
    if work.train:
        summary |= _train(trainer, prepared.tokenizer, checkpoint, prepared.data)
    if work.evaluate:
        for split in task_data.validations:
            summary |= _evaluate(trainer, prepared, task_data, split)
    if work.predict:
        _predict(trainer, prepared, task_data.tests)
    if is_main_process(args):
        write_summary(args.output_dir, summary)
    if args.do_train and not work.is_done:
        write_card(trainer)
    if work.push:
        publish(trainer)
        summary[PUSHED] = repository(args)
        if is_main_process(args):
            write_text(Path(args.output_dir) / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return trainer.accelerator.unwrap_model(trainer.model), summary


def _check_one(model_options: ModelArguments, data: DataTrainingArguments, args: TrainingArguments) -> None:
    check_options(args, data.max_seq_length)
    check_hooks(ClassifierTrainer)
    check_options_together(model_options, data, args)
    if len(model_options.model_name_or_path) > 1 or len(data.task_name) > 1:
        raise ValueError("one model and one task are wanted here; several are run by finetune_all")


def _with_early_stopping(args: TrainingArguments, patience: int) -> TrainingArguments:
    """Arguments that evaluate after every epoch, unless they say how often, save as often, and end with the best."""
    if not patience:
        return args
    args = copy.copy(args)
    if args.eval_strategy == "no":
        args.eval_strategy = IntervalStrategy.EPOCH
    # What is not saved when it is evaluated cannot be kept as the best.
    args.save_strategy, args.save_steps = SaveStrategy(args.eval_strategy.value), args.eval_steps or args.save_steps
    args.load_best_model_at_end = True
    args.save_total_limit = args.save_total_limit or 2
    return args


@dataclass
class _TaskEncoding:
    """How a split becomes model inputs, and outputs become the task's answers again."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    head: Head
    data: DataTrainingArguments

    def rows(self, split: Split):
        """Tokenized rows whose labels are outputs of the head."""
        labels = split.labels if self.task.is_regression else [self.head.order[label] for label in split.labels]
        split = dataclasses.replace(split, labels=labels)
        return tokenize_split(split, self.tokenizer, self.data.max_seq_length, self.data.pad_to_max_length)

    def answers(self, outputs) -> np.ndarray:
        """(S, num_labels) logits in the head's order -> (S,) the task's label ids, or values."""
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return decode_predictions(
            logits if self.task.is_regression else logits[:, self.head.order], self.task.is_regression
        )

    def references(self, labels: np.ndarray) -> np.ndarray:
        """(S,) outputs of the head -> the task's label ids, or values."""
        return labels if self.task.is_regression else np.argsort(self.head.order)[labels]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The task's metrics, for the Trainer."""
        references = self.references(prediction.label_ids.reshape(-1))
        return compute(self.task.metrics, self.answers(prediction.predictions), references)


class ClassifierTrainer(Trainer):
    """A Trainer whose `dataloader_drop_last` drops training rows only: every example is measured and answered."""

    HOOKS = ("get_eval_dataloader", "get_test_dataloader")
    SETTINGS = ()

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        """The Trainer's, of all rows."""
        with self._all_rows():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs) -> DataLoader:
        """The Trainer's, of all rows."""
        with self._all_rows():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _all_rows(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last


def _trainer(model, args, task_data: TaskData, prepared: _TaskEncoding, trains: bool) -> Trainer:
    if args.load_best_model_at_end and args.metric_for_best_model in (None, "loss"):
        args.metric_for_best_model, args.greater_is_better = task_data.task.metrics[0], True
    validation = next(iter(task_data.validations.values()), None)
    patience = prepared.data.early_stopping_patience
    trainer = ClassifierTrainer(
        model=model,
        args=args,
        train_dataset=prepared.rows(task_data.train) if trains else None,
        eval_dataset=prepared.rows(validation) if validation else None,
        data_collator=DataCollatorWithPadding(prepared.tokenizer),
        processing_class=prepared.tokenizer,
        compute_metrics=prepared.metrics,
        compute_loss_func=_balanced_loss(task_data, prepared.head, args.label_smoothing_factor)
        if prepared.data.class_weights == "balanced" and trains
        else None,
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
    )
    add_balance(trainer, prepared.data.balance_leaves)
    return trainer


def _balanced_loss(task_data: TaskData, head: Head, label_smoothing: float) -> Callable[..., Tensor]:
    """Cross-entropy in which all classes have the same total weight.

    The Trainer leaves label smoothing to a loss that it is given, so this one does it.
    """
    counts = np.bincount(task_data.train.labels, minlength=task_data.task.num_labels)  # (classes,)
    weights = torch.zeros(len(counts))
    for label, count in enumerate(counts):
        weights[head.order[label]] = len(task_data.train) / (len(counts) * count) if count else 0.0

    def loss(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        logits = outputs["logits"].float()  # (B, classes)
        total = torch.nn.functional.cross_entropy(
            logits, labels, weights.to(logits.device), reduction="sum", label_smoothing=label_smoothing
        )
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def _train(trainer: Trainer, tokenizer, checkpoint: str | None, data: DataTrainingArguments) -> dict[str, Any]:
    if data.overwrite_output_dir and is_main_process(trainer.args):
        remove_checkpoints(trainer.args.output_dir)
    result = train(trainer, checkpoint)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):  # adapters: what is measured and saved is the model that contains them
        trainer.model = trainer.model_wrapped = model.merge_and_unload()
    save_model(trainer, tokenizer)
    if is_main_process(trainer.args):
        write_recipe(trainer.args, max_seq_length=data.max_seq_length)
        plot_learning_curve(Path(trainer.args.output_dir) / "learning-curve.png", trainer.state.log_history)
    return result


def _evaluate(trainer: Trainer, prepared: _TaskEncoding, task_data: TaskData, name: str) -> dict[str, Any]:
    """Metrics of one validation split, each beside its majority baseline."""
    task, split = prepared.task, task_data.validations[name]
    training = (task_data.train or split).labels
    output = trainer.predict(prepared.rows(split), metric_key_prefix="eval")
    baseline = majority_baseline(task.metrics, training, split.labels, task.is_regression)
    ending = task_data.suffix(name)
    summary: dict[str, Any] = {f"examples{ending}": len(split)}
    for name in task.metrics:
        summary[f"{name}{ending}"] = output.metrics[f"eval_{name}"]
        summary[f"majority_{name}{ending}"] = baseline[name]
    summary[f"eval_seconds{ending}"] = round(output.metrics["eval_runtime"], 3)
    if is_main_process(trainer.args) and not task.is_regression:
        file = Path(trainer.args.output_dir) / f"confusion{ending.replace('_', '-')}.png"
        answers, references = prepared.answers(output.predictions), np.asarray(split.labels)
        plot_confusion(file, task.labels, references, answers)
    return summary


def _predict(trainer: Trainer, prepared: _TaskEncoding, tests: dict[str, Split]) -> None:
    """Answers for rows whose labels nobody has, in the form that the GLUE server wants."""
    for name, split in tests.items():
        answers = prepared.answers(trainer.predict(prepared.rows(split)).predictions)
        if is_main_process(trainer.args):
            write_predictions(Path(trainer.args.output_dir) / PREDICTIONS, prepared.task, name, split, answers)
