"""Masked-language-model pretraining: text, a model recipe and a budget in, a model folder and a summary out."""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from fastbert_hf.data.corpus_store import StoredCorpus
from fastbert_hf.data.masking import IGNORE_INDEX, check_probability
from fastbert_hf.data.order import MicrobatchOrder
from fastbert_hf.data.tokenizer import load_tokenizer, tokenizer_digest
from fastbert_hf.training.budget import UNITS, BudgetClock
from fastbert_hf.training.budget_progress import show_budget
from fastbert_hf.training.budget_trainer import BudgetTrainer
from fastbert_hf.training.checkpoints import check_checkpoint, find_checkpoint, remove_checkpoints
from fastbert_hf.training.leaf_balance import add_balance, check_balance
from fastbert_hf.training.pretraining.data import (
    CorpusArguments,
    PretrainingData,
    build_corpus_beside,
    check_corpus,
    load_pretraining_data,
    text_identity,
)
from fastbert_hf.training.pretraining.dense_start import (
    check_dense_start,
    dense_start_folder,
    write_dense_start,
)
from fastbert_hf.training.pretraining.model import build_model
from fastbert_hf.training.pretraining.report import write_pretraining_report
from fastbert_hf.training.pretraining.taught_trainer import TaughtTrainer, load_pretraining_teacher
from fastbert_hf.training.provenance import (
    Provenance,
    as_json,
    check_same_settings,
    training_settings,
    weights_identity,
)
from fastbert_hf.training.publishing import add_hub_files, check_push, publish
from fastbert_hf.training.runs import check_options, disable_pin_memory_on_cpu, is_main_process, save_model
from fastbert_hf.training.start_from_data import MAX_ROWS
from fastbert_hf.training.trainer_hooks import check_hooks
from fastbert_hf.training.tree_usage import TreeUsageCallback

SCHEDULES = ("triangle", "trainer")
# Training arguments that the options of this file replace, or that only say how many steps there are.
REPLACED = ("gradient_accumulation_steps", "max_steps", "num_train_epochs", "ignore_data_skip", "do_train")
# What decides which checkpoint is the best, and nothing else.
BEST = (
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "metric_for_best_model", "greater_is_better",
    "save_strategy", "save_steps", "prediction_loss_only",
)  # fmt: skip
# Options that change no weight, that a run may go on with, or that digests stand for.
NOT_COMPARED = (
    "overwrite_output_dir", "save_minutes", "evaluations", "verify_corpus", "mixed_precision", *UNITS,
    "corpus", "train_file", "validation_file", "validation_fraction", "text_column", "vocab_size",
    "model_config", "model_name_or_path", "tokenizer_name", "dense_checkpoint", "teacher_name_or_path",
)  # fmt: skip


@dataclass
class PretrainingArguments(CorpusArguments):
    """What is trained, on which text, and how much of it."""

    model_config: str | None = field(
        default=None, metadata={"help": "YAML, or recipe, with model configuration fields, e.g. model/small-1x9"}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "continue from these weights instead of a new model from model_config"}
    )
    dense_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "checkpoint of a dense run on this text: the model goes on from it, leaf trees with its neurons"
        },
    )
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "a trained FastBERT of this tokenizer; the model learns from it too"}
    )
    teacher_weight: float = field(
        default=0.5, metadata={"help": "of the divergence from the teacher in the loss; the rest is for the text"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "tokenizer folder or Hub name; a prepared corpus brings its own"}
    )
    budget_hours: float | None = field(
        default=None, metadata={"help": "train for so many hours of wall-clock; exactly one budget, or --max_steps"}
    )
    budget_cpu_hours: float | None = field(
        default=None,
        metadata={
            "aliases": ["--budget_processor_hours"],  # its earlier name
            "help": "hours of processor time per thread: what others take on a shared machine does not count",
        },
    )
    budget_tokens: float | None = field(default=None, metadata={"help": "train on so many tokens"})
    schedule: str = field(
        default="triangle",
        metadata={
            "help": "learning rate: triangle (a quarter of the peak at the start, the peak at three quarters of the "
            "budget, zero at its end) or trainer (--lr_scheduler_type, for --max_steps only)"
        },
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": "sequences per full optimiser step, all devices together; default: one microbatch"},
    )
    batch_ramp: float = field(
        default=0.0, metadata={"help": "part of the budget over which the batch grows to its full size"}
    )
    evaluations: int = field(default=0, metadata={"help": "evaluations spread evenly over the budget"})
    save_minutes: float = field(default=0.0, metadata={"help": "minutes between two checkpoints, beside save_steps"})
    max_bad_steps: int = field(
        default=10, metadata={"help": "steps with NaN or Inf in a row before going back to the last checkpoint"}
    )
    mixed_precision: bool = field(
        default=False, metadata={"help": "bfloat16 where a GPU has it, float16 on other GPUs, float32 on a CPU"}
    )
    sparse_prediction: bool = field(
        default=True, metadata={"help": "compute the decoder at predicted positions only while training"}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "train without dropout; the saved configuration keeps its values"}
    )
    balance_leaves: float = field(
        default=0.0,
        metadata={"help": "rate at which trees' thresholds follow medians, e.g. 0.5; 0: never"},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove the checkpoints in output_dir instead of resuming from them"}
    )


def _check(options: PretrainingArguments, args: TrainingArguments) -> None:
    check_hooks(BudgetTrainer)
    if (options.model_config is None) == (options.model_name_or_path is None):
        raise ValueError("expected exactly one of --model_config and --model_name_or_path")
    check_probability(options.mlm_probability)
    if options.schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {options.schedule!r}")
    if not 0 <= options.batch_ramp <= 1:
        raise ValueError(f"batch_ramp must lie between 0 and 1; got {options.batch_ramp}")
    for name in ("evaluations", "save_minutes"):
        if not 0 <= getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be zero or above; got {getattr(options, name)}")
    if not 0 <= options.teacher_weight <= 1:
        raise ValueError(f"teacher_weight must lie between 0 and 1; got {options.teacher_weight}")
    if options.max_bad_steps < 1:
        raise ValueError(f"max_bad_steps must be at least 1; got {options.max_bad_steps}")
    check_balance(options.balance_leaves)
    check_corpus(options)


def budget_clock(options: PretrainingArguments, args: TrainingArguments, epoch_steps: int) -> BudgetClock:
    """The run's budget; `args.max_steps` is set to a number that is never reached before it.

    Args:
        options: hours or tokens.
        args: `max_steps`, and without any budget `num_train_epochs`.
        epoch_steps: optimiser steps of one epoch at full batch size.

    Raises:
        ValueError: two budgets, one that is not positive, or a setting that needs a number of steps.
    """
    given = {name: getattr(options, name) for name in UNITS if getattr(options, name, None) is not None}
    if args.max_steps > 0:
        given["max_steps"] = args.max_steps
    if len(given) > 1:
        raise ValueError(f"expected one budget; got {' and '.join(f'--{name} {given[name]:g}' for name in given)}")
    if not given:
        given["max_steps"] = max(1, math.ceil(args.num_train_epochs * epoch_steps))
    ((unit, amount),) = given.items()
    if not 0 < amount < math.inf:
        raise ValueError(f"{unit} must be positive; got {amount}")
    if unit != "max_steps":
        if options.schedule == "trainer":
            raise ValueError(f"--schedule trainer counts steps, and {unit} sets none; leave it out")
        for name in ("logging_steps", "save_steps", "eval_steps"):
            if (value := getattr(args, name)) is not None and 0 < value < 1:
                raise ValueError(f"{name} {value} is a part of max_steps, and {unit} sets none; give a whole number")
    args.max_steps = int(amount) if unit == "max_steps" else 2**31 - 1
    return BudgetClock(unit, amount)


def choose_precision(args: TrainingArguments) -> None:
    """Have the device compute in the 16-bit format it has; a CPU stays at float32."""
    if args.device.type != "cuda" or args.bf16 or args.fp16:
        return
    args.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    args.fp16 = not args.bf16
    args.mixed_precision = "bf16" if args.bf16 else "fp16"


def step_size(options: PretrainingArguments, args: TrainingArguments) -> int:
    """Sequences of a full optimiser step; the library's own accumulation is replaced by whole microbatches.

    Raises:
        ValueError: a batch size that is not a multiple of what all devices take at once.
    """
    at_once = args.train_batch_size * args.world_size
    if options.batch_size is not None and args.gradient_accumulation_steps > 1:
        raise ValueError("--batch_size and --gradient_accumulation_steps say the same; give one of them")
    size = options.batch_size or at_once * args.gradient_accumulation_steps
    if size < at_once or size % at_once:
        raise ValueError(
            f"batch_size {size} is not a multiple of {at_once}: {args.train_batch_size} sequences on each of "
            f"{args.world_size} devices"
        )
    args.gradient_accumulation_steps = 1
    return size


def most_likely(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """(B, T, V) logits -> (B, T) most likely ids: all that the accuracy needs, and V times smaller."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(-1)


def masked_accuracy(prediction) -> dict[str, float]:
    """Fraction of predicted positions whose most likely token is the right one."""
    labels = prediction.label_ids
    return {"accuracy": float((prediction.predictions == labels)[labels != IGNORE_INDEX].mean())}


def pretrain(options: PretrainingArguments, args: TrainingArguments) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Pretrain a model with the masked-language-model objective.

    Picks up the last complete checkpoint in `args.output_dir`. The finished folder loads with
    `AutoModelForMaskedLM` and holds the tokenizer, `summary.json`, a model card and pictures.

    Args:
        options: model, text, masking and budget.
        args: optimisation, as for every Trainer.

    Returns:
        The trained model, and the summary: held-out loss and accuracy, unigram baseline, counts, times.

    Raises:
        ValueError: for anything wrong in the options, before training starts; for training that diverges.
    """
    check_options(args, options.max_seq_length)
    _check(options, args)
    check_push(args)
    checkpoint = find_checkpoint(args, options.overwrite_output_dir)
    if _tokenizer_name(options) is None:
        options = _with_corpus(options, args)  # it brings its own
    tokenizer = load_tokenizer(_tokenizer_name(options), needs_mask=True)
    disable_pin_memory_on_cpu(args)
    set_seed(args.seed)
    sparse = options.mlm_probability if options.sparse_prediction else 0.0
    model = build_model(
        options.model_config, options.model_name_or_path, tokenizer, options.max_seq_length, sparse,
        options.disable_dropout,
    )  # fmt: skip
    check_checkpoint(checkpoint, model.config)
    check_balance(options.balance_leaves, model)
    teacher = load_pretraining_teacher(options.teacher_name_or_path, tokenizer, model.config.vocab_size)
    provenance = _provenance(options, args, model, tokenizer, checkpoint)
    if options.mixed_precision:
        choose_precision(args)
    size = step_size(options, args)
    data = load_pretraining_data(_with_corpus(options, args), tokenizer, size, model.config.vocab_size, args.seed)
    clock = budget_clock(options, args, len(data.train) // size)
    trainer = _trainer(options, args, model, tokenizer, data, clock, size, provenance, teacher)
    if options.overwrite_output_dir and is_main_process(args):
        remove_checkpoints(args.output_dir)
    checkpoint = checkpoint or _begin_dense(options, args, model, data, provenance)
    add_hub_files(trainer)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    trainer.begin_part()
    if clock.fraction < 1:
        train_loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
    else:  # resumed at its end: the library would take one step more
        trainer.take_over(checkpoint)
        train_loss = None
    metrics = trainer.evaluate()
    if not math.isfinite(metrics["eval_loss"]):
        raise ValueError(f"training diverged: the held-out loss is {metrics['eval_loss']}; try a lower learning rate")
    save_model(trainer, tokenizer)
    metrics |= {"train_loss": train_loss, "resumed_from": checkpoint}
    summary = write_pretraining_report(trainer, options, data, metrics)
    publish(trainer)
    return model, summary


def _begin_dense(
    options: PretrainingArguments,
    args: TrainingArguments,
    model: PreTrainedModel,
    data: PretrainingData,
    provenance: Provenance,
) -> str | None:
    """The checkpoint that a run begins from: a dense run's, with trees in place of its dense layers; None without."""
    if options.dense_checkpoint is None:
        return None
    with args.main_process_first(local=False, desc="turning dense layers into trees"):
        if is_main_process(args):
            order = MicrobatchOrder(len(data.train), args.train_batch_size, args.seed)
            count = math.ceil(MAX_ROWS / (args.train_batch_size * options.max_seq_length))
            rows = itertools.islice(order, count)
            batches = [data.collator([data.train[row] for row in some]) for some in rows]
            write_dense_start(options.dense_checkpoint, model, batches, args.output_dir, provenance, args.seed)
    return str(dense_start_folder(options.dense_checkpoint, args.output_dir))


def _tokenizer_name(options: PretrainingArguments) -> str | None:
    """The tokenizer's folder or Hub name; None where a corpus has to be prepared first."""
    name = options.tokenizer_name or options.model_name_or_path
    if name is None and options.corpus is not None:
        name = str(StoredCorpus(options.corpus, verify=False).tokenizer_folder)
    return name


def _with_corpus(options: PretrainingArguments, args: TrainingArguments) -> PretrainingArguments:
    """The options with a prepared corpus in place of text files."""
    if options.corpus is not None:
        return options
    with args.main_process_first(local=False, desc="preparing the corpus"):
        folder = build_corpus_beside(options, args.output_dir, not args.disable_tqdm, _tokenizer_name(options))
    return dataclasses.replace(options, corpus=folder, train_file=[], validation_file=[])


def _provenance(
    options: PretrainingArguments,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: str | None,
) -> Provenance:
    """What the run is made with; one that goes on keeps the parts of before.

    Raises:
        ValueError: the checkpoint was made with other settings.
    """
    best = () if args.load_best_model_at_end else BEST
    settings = training_settings(args, (*REPLACED, *best))
    settings |= {name: value for name, value in vars(options).items() if name not in NOT_COMPARED}
    settings["batch_size"] = options.batch_size or (
        args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    )
    settings |= text_identity(options) | {"tokenizer": tokenizer_digest(tokenizer)}
    if options.model_name_or_path is not None:
        settings["model"] = weights_identity(options.model_name_or_path, model.config)
    if options.dense_checkpoint is not None:
        check_dense_start(options.dense_checkpoint, settings, model)
        settings["dense_checkpoint"] = weights_identity(options.dense_checkpoint, model.config)
    teacher = options.teacher_name_or_path
    settings["teacher"] = None if teacher is None else weights_identity(teacher, model.config)
    settings = as_json(settings)
    earlier = Provenance.read(checkpoint) if checkpoint is not None else None
    if earlier is not None:
        check_same_settings(earlier.settings, settings, checkpoint)
    return Provenance(settings, earlier.parts if earlier is not None else [])


def _trainer(
    options: PretrainingArguments,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PretrainingData,
    clock: BudgetClock,
    size: int,
    provenance: Provenance,
    teacher: PreTrainedModel | None,
) -> BudgetTrainer:
    kind, teaching = BudgetTrainer, {}
    if teacher is not None:
        kind, teaching = TaughtTrainer, {"teacher": teacher, "teacher_weight": options.teacher_weight}
    trainer = kind(
        **teaching,
        clock=clock,
        batch_size=size,
        ramp_fraction=options.batch_ramp,
        follows_clock=options.schedule == "triangle",
        evaluations=options.evaluations,
        save_minutes=options.save_minutes,
        max_bad_steps=options.max_bad_steps,
        provenance=provenance,
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collator,
        processing_class=tokenizer,
        compute_metrics=masked_accuracy,
        preprocess_logits_for_metrics=most_likely,
    )
    add_balance(trainer, options.balance_leaves)
    show_budget(trainer)
    trainer.add_callback(TreeUsageCallback(trainer))
    return trainer
