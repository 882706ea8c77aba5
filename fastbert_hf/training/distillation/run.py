"""Distillation: a model and text in, a folder with a faster model and a page that says what it lost out.

    teacher, text -> layers fitted one by one (fitted/) -> trained end to end (checkpoint-N/) -> the folder

Each stage leaves a model that loads, and a run that was interrupted goes on where it was.
"""

import contextlib
import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from fastbert_hf.data.masking import IGNORE_INDEX, MaskedLanguageModelCollator
from fastbert_hf.data.tokenizer import tokenizer_digest
from fastbert_hf.files import check_output_folder, file_digest, staged_folder, write_text
from fastbert_hf.modeling_fastbert import FastBertForMaskedLM
from fastbert_hf.training.budget import BudgetClock
from fastbert_hf.training.budget_progress import show_budget
from fastbert_hf.training.checkpoints import find_checkpoint, remove_checkpoints
from fastbert_hf.training.distillation.layer_fit import FitSettings
from fastbert_hf.training.distillation.objective import HiddenScale
from fastbert_hf.training.distillation.scores import check_labelled, score
from fastbert_hf.training.distillation.student import (
    Student,
    check_student_form,
    form_of,
    student_of,
    without_dropout,
)
from fastbert_hf.training.distillation.student_fit import fit_student
from fastbert_hf.training.distillation.teacher import Teacher, copy_embedder, load_teacher
from fastbert_hf.training.distillation.texts import TextBatches, as_device, check_text_files, read_texts, split_texts
from fastbert_hf.training.distillation.trainer import DistillationTrainer
from fastbert_hf.training.leaf_balance import add_balance, check_balance, leaf_layers
from fastbert_hf.training.provenance import (
    PROVENANCE,
    Provenance,
    as_json,
    check_same_settings,
    training_settings,
    weights_identity,
)
from fastbert_hf.training.runs import check_options, disable_pin_memory_on_cpu, save_model
from fastbert_hf.training.trainer_hooks import check_hooks
from fastbert_hf.training.tree_usage import counted_visits, tree_usage

FITTED, LAYERS, STAGES = "fitted", "layers", "stages.json"
SCALE_BATCHES = 64
MLM_PROBABILITY = 0.15
# what a run may go on with, or what digests stand for
NOT_COMPARED = (
    "overwrite_output_dir", "budget_minutes", "save_minutes", "model_name_or_path", "train_file", "eval_file",
)  # fmt: skip
REPLACED = (
    "gradient_accumulation_steps", "max_steps", "num_train_epochs", "ignore_data_skip", "do_train",
    "per_device_train_batch_size", "save_strategy", "save_steps", "eval_strategy", "eval_steps",
)  # fmt: skip


@dataclass
class DistillationArguments:
    """What is distilled into what, on which text, and how long."""

    model_name_or_path: str = field(
        metadata={"help": "folder or Hub name of a BERT, RoBERTa, DistilBERT or FastBERT"}
    )
    train_file: list[str] = field(metadata={"help": "your text: .txt (also .gz, .xz or .zst), .jsonl, .csv, .tsv"})
    fff_depth: int = field(default=5, metadata={"help": "depth of the trees: 2^depth leaves"})
    fff_leaf_width: int = field(default=96, metadata={"help": "neurons of a leaf"})
    fff_trees: int = field(default=1, metadata={"help": "trees of a layer"})
    form: str | None = field(
        default=None,
        metadata={"help": "in place of the three above: leaf:5x96, or a control: dense:96, tree:1x10, layers:3"},
    )
    eval_file: list[str] = field(
        default_factory=list,
        metadata={"help": "labelled data to score on: pairs with a score for embedders, or for classifiers"},
    )
    budget_minutes: float | None = field(
        default=None, metadata={"help": "minutes for everything; exactly one of this and --max_steps"}
    )
    texts_per_file: int = field(default=100_000, metadata={"help": "texts taken from each file, at random, at most"})
    held_out_texts: int = field(default=1000, metadata={"help": "texts kept back to measure on, at most"})
    max_seq_length: int = field(default=128, metadata={"help": "longer texts are cut to this many tokens"})
    batch_size: int = field(default=48, metadata={"help": "texts of an optimizer step"})
    fit_rows: int = field(default=100_000, metadata={"help": "tokens on which each layer is fitted, at most"})
    fit_steps: int = field(default=800, metadata={"help": "steps of each layer's fit; 0 leaves the start from data"})
    fit_rows_per_step: int = field(default=1024, metadata={"help": "tokens of each"})
    fit_learning_rate: float = field(default=1e-3, metadata={"help": "of each layer's fit"})
    balance_leaves: float = field(default=0.5, metadata={"help": "rate at which thresholds follow medians; 0: never"})
    train_embeddings: bool = field(default=False, metadata={"help": "train the embeddings too"})
    save_minutes: float = field(default=5.0, metadata={"help": "minutes between two checkpoints"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what an earlier run left in output_dir instead of going on with it"}
    )

    @property
    def student_form(self) -> str:
        """The student's feed-forward layers."""
        return self.form or form_of(self.fff_trees, self.fff_depth, self.fff_leaf_width)

    def check(self, args: TrainingArguments) -> None:
        """Check what can be checked before anything is read.

        Raises:
            ValueError: naming the option.
        """
        check_student_form(self.student_form)
        for name in ("texts_per_file", "batch_size", "fit_rows", "fit_rows_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("held_out_texts", "fit_steps", "save_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be zero or above; got {getattr(self, name)}")
        check_balance(self.balance_leaves)
        if (self.budget_minutes is None) == (args.max_steps <= 0):
            raise ValueError("expected exactly one of --budget_minutes and --max_steps")
        if self.budget_minutes is not None and not 0 < self.budget_minutes < math.inf:
            raise ValueError(f"budget_minutes must be positive; got {self.budget_minutes}")
        check_text_files(self.train_file)


class MaskedBatches(Dataset):
    """Batches with tokens masked; the same ones each time a batch is taken.

    Args:
        batches: of `TextBatches`. collator: what masks.
    """

    def __init__(self, batches: TextBatches, collator: MaskedLanguageModelCollator):
        self.batches, self.collator = batches, collator

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A batch and `masked` (B, T), where a token was masked."""
        batch = self.batches[index]
        masked = self.collator.mask(batch["input_ids"])
        return {**batch, "input_ids": masked["input_ids"], "masked": masked["labels"] != IGNORE_INDEX}


class Stages:
    """What is done of a run and how long it took, in a file of its folder.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self._file = folder / STAGES
        self._done: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage, also of one that is interrupted by an error."""
        began, before = time.perf_counter(), self.seconds(name)
        try:
            yield
        finally:
            self.put(f"{name}_seconds", round(before + time.perf_counter() - began, 1))

    def seconds(self, name: str) -> float:
        """Seconds of a stage until now."""
        return self._done.get(f"{name}_seconds", 0.0)

    def put(self, name: str, value: Any) -> None:
        """Remember a value that JSON can hold."""
        self._done[name] = value
        write_text(self._file, json.dumps(self._done, indent=2) + "\n")

    def get(self, name: str, default: Any = None) -> Any:
        """A value that was put."""
        return self._done.get(name, default)


def distill(options: DistillationArguments, args: TrainingArguments) -> tuple[Student, Teacher, dict[str, Any]]:
    """Distil a model.

    Args:
        options: model, text, form and budget.
        args: optimisation, as for every Trainer, and `output_dir`.

    Returns:
        The student, its teacher, and the summary.

    Raises:
        ValueError: for anything wrong in the options, before work starts; for training that diverges.
        MissingExtraError: an extra that is needed is not installed.
    """
    check_options(args, options.max_seq_length)
    check_hooks(DistillationTrainer)
    options.check(args)
    folder = check_output_folder(args.output_dir)
    if options.overwrite_output_dir:
        _remove_run(folder)
    checkpoint = find_checkpoint(args)
    disable_pin_memory_on_cpu(args)
    set_seed(args.seed)
    teacher = load_teacher(options.model_name_or_path)
    length = min(options.max_seq_length, teacher.max_seq_length)
    for file in options.eval_file:
        check_labelled(file, teacher)
    provenance = _provenance(options, args, teacher)
    folder.mkdir(parents=True, exist_ok=True)
    provenance.write(folder)
    stages = Stages(folder)

    student = student_of(teacher.model, options.student_form)
    train, held_out = _texts(options, teacher, length, args.seed)
    if not (folder / FITTED / "config.json").is_file():
        with stages.timed("fit"):
            _fit(options, args, teacher, student, train, stages)
        _save(student, teacher, folder / FITTED)
    else:
        student = dataclasses.replace(student, model=type(student.model).from_pretrained(folder / FITTED))

    variance = _hidden_variance(teacher, train, args.device)
    scores = stages.get("scores") or {}
    for file in options.eval_file:
        if file not in scores:
            models = {"teacher": teacher.model, "fitted": student.model}
            scores[file] = {name: score(model, teacher, file, length) for name, model in models.items()}
    stages.put("scores", scores)
    trainer = _trainer(options, args, student, teacher, variance, (train, held_out), provenance, stages)
    before = trainer.measure(held_out, "fitted") if checkpoint is None else stages.get("fitted_metrics")
    stages.put("fitted_metrics", before)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    trainer.begin_part()
    if trainer.clock.share < 1:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:  # resumed at its end: the library would take one step more
        trainer.take_over(checkpoint)
    metrics = trainer.measure(held_out)
    if not math.isfinite(metrics["eval_hidden_error"]):
        raise ValueError("training diverged: the hidden-state error is not finite; try a lower learning rate")
    save_model(trainer, teacher.tokenizer)
    copy_embedder(teacher.folder, folder)
    for file in options.eval_file:
        scores[file]["student"] = score(student.model, teacher, file, length)
    return (
        student,
        teacher,
        {**_summary(options, args, student, trainer, stages, {**before, **metrics}, held_out), "scores": scores},
    )


def _remove_run(folder: Path) -> None:
    """Remove what an earlier distillation left; a folder of something else stays as it is."""
    if not (folder / PROVENANCE).is_file():
        return
    remove_checkpoints(folder)
    for name in (FITTED, LAYERS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("config.json", STAGES, PROVENANCE):
        (folder / name).unlink(missing_ok=True)


def _provenance(options: DistillationArguments, args: TrainingArguments, teacher: Teacher) -> Provenance:
    """What the run is made with; one that goes on must be made with the same.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    settings = training_settings(args, REPLACED)
    settings |= {name: value for name, value in vars(options).items() if name not in NOT_COMPARED}
    settings |= {"form": options.student_form, "text": [file_digest(file) for file in options.train_file]}
    settings |= {"tokenizer": tokenizer_digest(teacher.tokenizer)}
    settings["model"] = weights_identity(str(teacher.folder), teacher.model.config)
    settings = as_json(settings)
    folder = Path(args.output_dir)
    if (folder / PROVENANCE).is_file():
        earlier = Provenance.read(folder)
        check_same_settings(earlier.settings, settings, str(folder))
        return Provenance(settings, earlier.parts)
    if (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds a model that is not of a distillation; choose another output_dir")
    return Provenance(settings)


def _texts(options: DistillationArguments, teacher: Teacher, length: int, seed: int) -> tuple[Dataset, Dataset]:
    draw = random.Random(seed)
    with_pairs = type(teacher.model).__name__.endswith("ForSequenceClassification")
    texts = read_texts(options.train_file, options.texts_per_file, draw, pairs=with_pairs)
    parts = split_texts(texts, options.held_out_texts, draw)
    if not parts[1]:
        raise ValueError(f"the text holds {len(parts[0])} different texts; expected at least 10, to hold some back")
    sizes = (options.batch_size, min(options.batch_size, len(parts[1])))
    batches = [TextBatches(part, teacher.tokenizer, length, size, seed) for part, size in zip(parts, sizes)]
    if isinstance(teacher.model, FastBertForMaskedLM):
        collator = MaskedLanguageModelCollator(teacher.tokenizer, MLM_PROBABILITY, seed)
        return tuple(MaskedBatches(part, collator) for part in batches)
    return tuple(batches)


def _in_turn(batches: Dataset, device: torch.device, at_most: int) -> Iterator[dict[str, Tensor]]:
    for number in range(min(at_most, len(batches))):
        batch = as_device(batches[number], device)
        yield {name: value for name, value in batch.items() if name != "masked"}


def _fit(options, args, teacher: Teacher, student: Student, train: Dataset, stages: Stages) -> None:
    form = options.student_form
    if form.startswith("layers:"):
        return
    errors = stages.get("unexplained", {})

    def report(layer: int, unexplained: float, seconds: float) -> None:
        errors[str(layer)] = round(unexplained, 4)
        stages.put("unexplained", errors)
        count = teacher.model.config.num_hidden_layers
        print(
            f"layer {layer + 1} of {count} fitted in {seconds:.0f} s: {1 - unexplained:.1%} of what the dense layer "
            "does is explained",
            flush=True,
        )

    settings = FitSettings(
        options.fit_steps, options.fit_rows_per_step, options.fit_learning_rate, options.balance_leaves, args.seed
    )
    folder = Path(args.output_dir) / LAYERS
    enough = max(1, math.ceil(4 * options.fit_rows / (8 * options.batch_size)))  # batches of 8 tokens a text or more
    batches = _in_turn(train, torch.device("cpu"), enough)
    fit_student(
        student.encoder, teacher.encoder, form, batches, folder, settings, max_rows=options.fit_rows, report=report
    )


def _hidden_variance(teacher: Teacher, batches: Dataset, device: torch.device) -> Tensor:
    encoder = teacher.encoder.to(device)
    scale = HiddenScale(encoder.config.num_hidden_layers, encoder.config.hidden_size)
    with torch.no_grad():
        for batch in _in_turn(batches, device, SCALE_BATCHES):
            states = encoder(**batch, output_hidden_states=True).hidden_states
            scale.add(states[1:], batch["attention_mask"])
    return scale.variance()


def _trainer(options, args, student, teacher, variance, data, provenance, stages) -> DistillationTrainer:
    args.per_device_train_batch_size = args.per_device_eval_batch_size = 1  # an item is a batch already
    args.gradient_accumulation_steps = 1
    if options.budget_minutes is None:
        clock = BudgetClock("max_steps", args.max_steps)
    else:
        left = options.budget_minutes - stages.seconds("fit") / 60
        if left <= 0:
            raise ValueError(
                f"fitting the layers took {stages.seconds('fit') / 60:.1f} minutes: nothing of budget_minutes "
                f"{options.budget_minutes:g} is left; {args.output_dir}/{FITTED} holds the model so far"
            )
        clock = BudgetClock("budget_hours", left / 60)
        args.max_steps = 2**31 - 1
    model = without_dropout(student.model)
    model.requires_grad_(True)
    if not options.train_embeddings:
        student.encoder.embeddings.requires_grad_(False)
    trainer = DistillationTrainer(
        student=student,
        teacher=teacher.model,
        variance=variance,
        embed=teacher.embed,
        clock=clock,
        save_minutes=options.save_minutes,
        provenance=provenance,
        args=args,
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=teacher.tokenizer,
    )
    if leaf_layers(model):
        add_balance(trainer, options.balance_leaves)
    show_budget(trainer)
    return trainer


def _save(student: Student, teacher: Teacher, folder: Path) -> None:
    with staged_folder(folder) as stage:
        student.model.save_pretrained(stage)
        teacher.tokenizer.save_pretrained(stage)
        copy_embedder(teacher.folder, stage)


def _summary(options, args, student, trainer, stages, metrics, held_out) -> dict[str, Any]:
    clock = trainer.clock
    with counted_visits(student.encoder) as counts, torch.no_grad():
        student.model.eval()
        for batch in _in_turn(held_out, args.device, 64):
            student.encoder(**batch)
    usage = tree_usage(counts)
    config = student.model.config
    return {
        "model": options.model_name_or_path,
        "form": options.student_form,
        "neurons_per_token": config.neurons_per_token,
        "neurons_per_layer": config.neurons_per_layer,
        **{name: value for name, value in metrics.items()},
        "unexplained_by_layer": list(stages.get("unexplained", {}).values()),
        "fit_seconds": stages.seconds("fit"),
        "train_seconds": round(clock.spent.seconds, 1),
        "steps": clock.spent.steps,
        "tokens_seen": clock.spent.tokens,
        "texts": len(trainer.train_dataset) * options.batch_size,
        "skipped_steps": trainer.skipped_steps,
        "dead_leaves": sum(len(layer.get("dead_leaves", ())) for layer in usage),
        "largest_leaf_share": max(
            (max(map(max, layer["leaf_shares"])) for layer in usage if "leaf_shares" in layer), default=None
        ),
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "sources": [{"name": Path(file).name, "sha256": file_digest(file)} for file in options.train_file],
    }
