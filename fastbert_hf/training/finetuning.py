"""Fine-tuning a sequence classifier on one GLUE-format task."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastbert_hf.data.glue import Split, Task, load_glue, load_task_files
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.metrics import compute, decode_predictions, majority_baseline
from fastbert_hf.training.publishing import check_push, prepare_folder, publish, write_recipe
from fastbert_hf.training.runs import (
    check_checkpoint,
    check_fit,
    check_options,
    check_weights,
    find_checkpoint,
    is_main_process,
    quiet_host,
    remove_checkpoints,
    save_model,
    train,
    write_summary,
)


@dataclass
class DataTrainingArguments:
    """What the model is fine-tuned and evaluated on; the names are those of the official run_glue example."""

    task_name: str | None = field(
        default=None, metadata={"help": "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli"}
    )
    glue_dir: str | None = field(
        default=None, metadata={"help": "folder <task>/{train,validation}.jsonl; without it the Hub's nyu-mll/glue"}
    )
    train_file: str | None = field(default=None, metadata={"help": "own training data: .jsonl, .json, .csv or .tsv"})
    validation_file: str | None = field(default=None, metadata={"help": "own validation data of the same columns"})
    max_seq_length: int = field(default=128, metadata={"help": "longer inputs are cut to this many tokens"})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "pad to max_seq_length instead of the longest input of each batch"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only the first so many rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate only the first so many rows"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove the checkpoints in output_dir instead of resuming from them"}
    )


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "model folder or Hub name"})
    config_name: str | None = field(default=None, metadata={"help": "other configuration than the model's"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "other tokenizer than the model's"})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "replace a classification head with another number of labels"}
    )


def load_task(options: DataTrainingArguments) -> tuple[Task, Split, dict[str, Split]]:
    """Load the data that the options name.

    Args:
        options: a task by name, or files of one's own.

    Returns:
        (task, training split, {validation name: split}).

    Raises:
        ValueError: if neither or both are named, or the data is bad.
    """
    if options.train_file or options.validation_file:
        if options.task_name or options.glue_dir:
            raise ValueError("--task_name with --glue_dir, or --train_file with --validation_file; got both")
        if not (options.train_file and options.validation_file):
            raise ValueError("--train_file and --validation_file are wanted together")
        task, train, validations = load_task_files(None, options.train_file, [options.validation_file])
    elif options.task_name:
        task, train, validations = load_glue(options.task_name, options.glue_dir)
    else:
        raise ValueError("no data: give --task_name, or --train_file and --validation_file")
    return (
        task,
        train.head(options.max_train_samples),
        {name: split.head(options.max_eval_samples) for name, split in validations.items()},
    )


def tokenize(split: Split, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, pad: bool):
    """Tokenize a split.

    Args:
        split: S examples.
        tokenizer: how.
        max_seq_length: cut to this length, the longer text of a pair first.
        pad: pad to that length here; otherwise the collator pads each batch.

    Returns:
        A `datasets.Dataset` of S rows: the tokenizer's columns and `labels`.
    """
    from datasets import Dataset

    encoded = tokenizer(
        *split.texts, truncation=True, max_length=max_seq_length, padding="max_length" if pad else False
    )
    return Dataset.from_dict({**encoded, "labels": split.labels})


def trained_labels(config: PreTrainedConfig, task: Task) -> tuple[str, ...] | None:
    """The label names of a checkpoint's trained classification head, by output.

    Args:
        config: the checkpoint's configuration.
        task: what the head is wanted for.

    Returns:
        The names; those of the task where the checkpoint has none of its own (LABEL_0 ...) or its single output is
        a value. None without a head.
    """
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return task.labels if len(names) == task.num_labels and (unnamed or task.is_regression) else names


def output_order(labels: tuple[str, ...], trained: tuple[str, ...]) -> list[int] | None:
    """Where a trained head has the labels of a task; it may write them in another case.

    Args:
        labels: the task's label names by id.
        trained: the head's, by output.

    Returns:
        The output of each of the task's ids, or None if the names differ.
    """
    for spelled in (str, str.casefold):
        wanted, found = list(map(spelled, labels)), list(map(spelled, trained))
        if len(set(wanted)) == len(wanted) and sorted(wanted) == sorted(found):
            return [found.index(name) for name in wanted]
    return None


def _classifier(model: ModelArguments, task: Task) -> tuple[PreTrainedModel, list[int]]:
    """Load configuration and weights with a head that fits the task: (model, output of each of the task's ids)."""
    path = Path(model.model_name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"no model in {str(path)!r}: config.json is missing")
    check_weights(path)
    try:
        stored = AutoConfig.from_pretrained(model.model_name_or_path)
        config = AutoConfig.from_pretrained(model.config_name) if model.config_name else copy.deepcopy(stored)
        names, order = task.labels or ("value",), list(range(task.num_labels))
        trained = trained_labels(stored, task)
        new_head = trained is not None and output_order(task.labels, trained) is None
        if new_head and not model.ignore_mismatched_sizes:
            raise ValueError(
                f"the classifier in {str(path)!r} has {len(trained)} outputs ({', '.join(trained)}) and {task.name} "
                f"wants {task.num_labels} ({', '.join(names)}); --ignore_mismatched_sizes replaces it with a new one"
            )
        if trained and not new_head:
            names, order = trained, output_order(task.labels, trained)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.problem_type = "regression" if task.is_regression else "single_label_classification"
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model.model_name_or_path, config=config, ignore_mismatched_sizes=model.ignore_mismatched_sizes
        )
        if new_head:
            fresh = AutoModelForSequenceClassification.from_config(config)
            fresh.base_model.load_state_dict(loaded.base_model.state_dict())
            loaded = fresh
        return loaded, order
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no model can be loaded from {model.model_name_or_path!r}: {reason}") from error


def _check(model: ModelArguments, args: TrainingArguments) -> None:
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing")
    if args.do_predict:
        raise ValueError("--do_predict is not available; --do_eval measures the validation split")
    if not (args.do_train or args.do_eval):
        raise ValueError("nothing to do: give --do_train, --do_eval or both")


def finetune(
    model_options: ModelArguments, data: DataTrainingArguments, args: TrainingArguments
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fine-tune and evaluate a classifier on one task.

    Metrics are those of the last epoch, unless `args` asks for the best checkpoint. The output folder receives the
    model, the tokenizer and `summary.json`.

    Args:
        model_options: which model.
        data: which task.
        args: optimisation, as for every Trainer; `do_train` and `do_eval` choose the steps.

    Returns:
        The fine-tuned model, and the summary: metrics and majority baseline per validation split, counts, times.

    Raises:
        ValueError: for anything wrong in the options or the data, before training starts.
    """
    check_options(args, data.max_seq_length)
    _check(model_options, args)
    check_push(args)
    checkpoint = find_checkpoint(args, data.overwrite_output_dir)
    task, training, validations = load_task(data)
    tokenizer = load_tokenizer(model_options.tokenizer_name or model_options.model_name_or_path)
    quiet_host(args)
    set_seed(args.seed)
    model, order = _classifier(model_options, task)
    check_fit(model.config, tokenizer, data.max_seq_length)
    check_checkpoint(checkpoint, model.config)

    def prepared(split: Split):
        split = dataclasses.replace(split, labels=_by_output(split.labels, task, order))
        return tokenize(split, tokenizer, data.max_seq_length, data.pad_to_max_length)

    evaluations = {name: prepared(split) for name, split in validations.items()}
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=prepared(training) if args.do_train else None,
        eval_dataset=next(iter(evaluations.values())),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=_metrics(task, order),
    )
    summary: dict[str, Any] = {"task": task.name, "train_examples": len(training), "seed": args.seed}
    if args.do_train:
        summary |= _train(trainer, tokenizer, checkpoint, data)
    if args.do_eval:
        for name, rows in evaluations.items():
            split = validations[name]
            summary |= _evaluate(trainer, rows, name if len(evaluations) > 1 else "", task, training, split)
    if is_main_process(args):
        write_summary(args.output_dir, summary)
    if args.do_train:
        publish(trainer)
    return model, summary


def _by_output(labels: list, task: Task, order: list[int]) -> list:
    """The task's label ids as outputs of the head; values stay."""
    return labels if task.is_regression else [order[label] for label in labels]


def _metrics(task: Task, order: list[int]) -> Callable[[EvalPrediction], dict[str, float]]:
    """What the Trainer computes from logits and labels, both in the order of the head's outputs."""

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        references = prediction.label_ids.reshape(-1)
        if not task.is_regression:
            logits, references = logits[:, order], np.argsort(order)[references]  # the head's order -> the task's
        return compute(task.metrics, decode_predictions(logits, task.is_regression), references)

    return metrics


def _train(trainer: Trainer, tokenizer, checkpoint: str | None, data: DataTrainingArguments) -> dict[str, Any]:
    if data.overwrite_output_dir and is_main_process(trainer.args):
        remove_checkpoints(trainer.args.output_dir)
    prepare_folder(trainer)
    result = train(trainer, checkpoint)
    save_model(trainer, tokenizer)
    if is_main_process(trainer.args):
        write_recipe(trainer.args, max_seq_length=data.max_seq_length)
    return result


def _evaluate(trainer: Trainer, rows, suffix: str, task: Task, training: Split, split: Split) -> dict[str, Any]:
    """Metrics of one validation split, each beside its majority baseline."""
    measured = trainer.evaluate(rows)
    baseline = majority_baseline(task.metrics, training.labels, split.labels, task.is_regression)
    ending = f"_{suffix}" if suffix else ""
    summary: dict[str, Any] = {f"examples{ending}": len(split)}
    for name in task.metrics:
        summary[f"{name}{ending}"] = measured[f"eval_{name}"]
        summary[f"majority_{name}{ending}"] = baseline[name]
    return summary
