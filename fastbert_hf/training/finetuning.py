"""Fine-tuning a sequence classifier on one GLUE-format task with one seed."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
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

from fastbert_hf.data.glue import Split, Task, TaskData, load_glue, load_task_files
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.checkpoints import check_checkpoint, find_checkpoint, remove_checkpoints
from fastbert_hf.training.classifier import Head, ModelArguments, fit_head, load_classifier, restrict_training
from fastbert_hf.training.figures import plot_confusion, plot_learning_curve
from fastbert_hf.training.glue_submission import write_predictions
from fastbert_hf.training.metrics import compute, decode_predictions, majority_baseline
from fastbert_hf.training.publishing import check_push, prepare_folder, publish, write_card, write_recipe
from fastbert_hf.training.runs import (
    check_fit,
    check_options,
    is_main_process,
    quiet_host,
    save_model,
    train,
    write_summary,
)


@dataclass
class DataTrainingArguments:
    """What models are fine-tuned and evaluated on; the names are those of the official run_glue example."""

    task_name: list[str] = field(
        default_factory=list,
        metadata={"help": "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, several of them, or all"},
    )
    glue_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder <task>/{train,validation,test}.jsonl (or .json, .parquet, .csv, .tsv with a "
            "header); without it the Hub's nyu-mll/glue"
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "own training data: .jsonl, .json, .parquet, .csv or .tsv"}
    )
    validation_file: str | None = field(default=None, metadata={"help": "own validation data of the same columns"})
    test_file: str | None = field(default=None, metadata={"help": "own data to predict, without labels"})
    seeds: list[int] = field(default_factory=list, metadata={"help": "a run for each; default: the one of --seed"})
    max_seq_length: int = field(default=128, metadata={"help": "longer inputs are cut to this many tokens"})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "pad to max_seq_length instead of the longest input of each batch"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only the first so many rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate only the first so many rows"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "predict only the first so many rows"})
    class_weights: str = field(
        default="none",
        metadata={
            "help": "balanced: the rarer a class, the more its examples weigh",
            "choices": ["none", "balanced"],
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "stop after so many evaluations without a better main metric and keep the best; 0: never"},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what output_dir holds of these runs instead of resuming from it"}
    )

    def __post_init__(self):
        names = [self.task_name] if isinstance(self.task_name, str) else self.task_name or []
        self.task_name = [part for name in names for part in name.split(",") if part]

    def check(self, args: TrainingArguments) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: naming the option.
        """
        if not (args.do_train or args.do_eval or args.do_predict):
            raise ValueError("nothing to do: give --do_train, --do_eval or --do_predict")
        own = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name)]
        if own and (self.task_name or self.glue_dir):
            raise ValueError(f"--task_name with --glue_dir, or --{own[0]}; got both")
        if not (own or self.task_name):
            raise ValueError("no data: give --task_name, or --train_file and --validation_file")
        wanted = {"train_file": args.do_train, "validation_file": args.do_eval, "test_file": args.do_predict}
        if own and (missing := [name for name, needed in wanted.items() if needed and name not in own]):
            raise ValueError(f"--{missing[0]} is missing; --{' and --'.join(own)} alone do not do what was asked")
        if self.early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience must be 0 or above; got {self.early_stopping_patience}")
        if self.early_stopping_patience and not args.do_train:
            raise ValueError("early_stopping_patience needs --do_train")


def load_task(options: DataTrainingArguments, name: str | None, args: TrainingArguments) -> TaskData:
    """Load the data of one task.

    Args:
        options: where it is.
        name: GLUE task, or None for files of one's own.
        args: `do_train` and `do_predict` say which splits must be there.

    Returns:
        The task and its splits, cut to the options' limits.

    Raises:
        ValueError: if the data is missing or bad.
    """
    if name is None:
        files = [options.validation_file] if options.validation_file else []
        tests = [options.test_file] if options.test_file else []
        data = load_task_files(None, options.train_file, files, tests)
    else:
        data = load_glue(name, options.glue_dir, need_train=args.do_train, need_test=args.do_predict)
    if options.class_weights != "none" and data.task.is_regression:
        raise ValueError(f"class_weights: {data.task.name} has no classes")
    return data.limited(options.max_train_samples, options.max_eval_samples, options.max_predict_samples)


def tokenize(split: Split, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, pad: bool):
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
    tokenizer, card, pictures of learning curve and confused classes, predictions if wanted, and `summary.json`.

    Args:
        model_options: one model, and which of its weights are trained.
        data: one task.
        args: optimisation, as for every Trainer; `do_train`, `do_eval` and `do_predict` choose the steps.
        task_data: the task's data, if it is loaded already.
        name: what the summary calls the model; default: its path or Hub name.

    Returns:
        The fine-tuned model, and the summary: metrics and majority baseline per validation split, counts, times.

    Raises:
        ValueError: for anything wrong in the options or the data, before training starts.
    """
    _check_one(model_options, data, args)
    check_push(args)
    args = _with_early_stopping(args, data.early_stopping_patience)
    checkpoint = find_checkpoint(args, data.overwrite_output_dir)
    task_data = task_data or load_task(data, next(iter(data.task_name), None), args)
    source, task = model_options.model_name_or_path[0], task_data.task
    tokenizer = load_tokenizer(model_options.tokenizer_name or source, **model_options.hub)
    quiet_host(args)
    set_seed(args.seed)
    head = fit_head(model_options, source, task)
    check_fit(head.config, tokenizer, data.max_seq_length)
    check_checkpoint(checkpoint, head.config)
    model = restrict_training(load_classifier(model_options, source, head), model_options)
    prepared = _Preparation(tokenizer, task, head, data)
    trainer = _trainer(model, args, data, task_data, prepared)
    summary = {
        "model": name or source,
        "task": task.name,
        "seed": args.seed,
        "train_examples": len(task_data.train or ()),
    }
    if args.do_train:
        summary |= _train(trainer, tokenizer, checkpoint, data)
    if args.do_eval:
        for split in task_data.validations:
            summary |= _evaluate(trainer, prepared, task_data, split)
    if args.do_predict:
        _predict(trainer, prepared, task_data.tests)
    if is_main_process(args):
        write_summary(args.output_dir, summary)
    if args.do_train:
        write_card(trainer)
        publish(trainer)
    return trainer.accelerator.unwrap_model(trainer.model), summary


def _check_one(model_options: ModelArguments, data: DataTrainingArguments, args: TrainingArguments) -> None:
    check_options(args, data.max_seq_length)
    model_options.check()
    data.check(args)
    if len(model_options.model_name_or_path) > 1 or len(data.task_name) > 1:
        raise ValueError("one model and one task are wanted here; several are run by finetune_all")


def _with_early_stopping(args: TrainingArguments, patience: int) -> TrainingArguments:
    """Arguments that evaluate and save after every epoch, unless they say how often, and end with the best."""
    if not patience:
        return args
    args = copy.copy(args)
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        args.eval_strategy = args.save_strategy = "epoch"
    args.load_best_model_at_end = True
    args.save_total_limit = args.save_total_limit or 2
    return args


@dataclass
class _Preparation:
    """How a split becomes model inputs, and outputs become the task's answers again."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    head: Head
    data: DataTrainingArguments

    def rows(self, split: Split):
        """Tokenized rows whose labels are outputs of the head."""
        labels = split.labels if self.task.is_regression else [self.head.order[label] for label in split.labels]
        split = dataclasses.replace(split, labels=labels)
        return tokenize(split, self.tokenizer, self.data.max_seq_length, self.data.pad_to_max_length)

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


def _trainer(model, args, data: DataTrainingArguments, task_data: TaskData, prepared: _Preparation) -> Trainer:
    if args.load_best_model_at_end and args.metric_for_best_model in (None, "loss"):
        args.metric_for_best_model, args.greater_is_better = task_data.task.metrics[0], True
    validation = next(iter(task_data.validations.values()), None)
    patience = data.early_stopping_patience
    return Trainer(
        model=model,
        args=args,
        train_dataset=prepared.rows(task_data.train) if args.do_train else None,
        eval_dataset=prepared.rows(validation) if validation else None,
        data_collator=DataCollatorWithPadding(prepared.tokenizer),
        processing_class=prepared.tokenizer,
        compute_metrics=prepared.metrics,
        compute_loss_func=_balanced_loss(task_data, prepared.head) if data.class_weights == "balanced" else None,
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
    )


def _balanced_loss(task_data: TaskData, head: Head) -> Callable[..., Tensor]:
    """Cross-entropy in which all classes have the same total weight."""
    counts = np.bincount(task_data.train.labels, minlength=task_data.task.num_labels)  # (classes,)
    weights = torch.zeros(len(counts))
    for label, count in enumerate(counts):
        weights[head.order[label]] = len(task_data.train) / (len(counts) * count) if count else 0.0

    def loss(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        logits = outputs["logits"].float()  # (B, classes)
        total = torch.nn.functional.cross_entropy(logits, labels, weights.to(logits.device), reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def _train(trainer: Trainer, tokenizer, checkpoint: str | None, data: DataTrainingArguments) -> dict[str, Any]:
    if data.overwrite_output_dir and is_main_process(trainer.args):
        remove_checkpoints(trainer.args.output_dir)
    prepare_folder(trainer)
    result = train(trainer, checkpoint)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):  # adapters: what is measured and saved is the model that contains them
        trainer.model = trainer.model_wrapped = model.merge_and_unload()
    save_model(trainer, tokenizer)
    if is_main_process(trainer.args):
        write_recipe(trainer.args, max_seq_length=data.max_seq_length)
        plot_learning_curve(Path(trainer.args.output_dir) / "learning-curve.png", trainer.state.log_history)
    return result


def _evaluate(trainer: Trainer, prepared: _Preparation, task_data: TaskData, name: str) -> dict[str, Any]:
    """Metrics of one validation split, each beside its majority baseline."""
    task, split = prepared.task, task_data.validations[name]
    training = (task_data.train or split).labels
    output = trainer.predict(prepared.rows(split), metric_key_prefix="eval")
    baseline = majority_baseline(task.metrics, training, split.labels, task.is_regression)
    ending = f"_{name}" if len(task_data.validations) > 1 else ""
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


def _predict(trainer: Trainer, prepared: _Preparation, tests: dict[str, Split]) -> None:
    """Answers for rows whose labels nobody has, in the form that the GLUE server wants."""
    for name, split in tests.items():
        answers = prepared.answers(trainer.predict(prepared.rows(split)).predictions)
        if is_main_process(trainer.args):
            write_predictions(Path(trainer.args.output_dir) / "predictions", prepared.task, name, split, answers)
