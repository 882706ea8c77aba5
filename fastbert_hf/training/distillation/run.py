"""Distillation: a model and text in, a folder with a faster model and what it lost out.

    teacher, text -> layers fitted one by one (fitted/) -> trained end to end (checkpoint-N/) -> the folder

Each stage leaves a model that loads, and a run that was interrupted goes on where it was.
"""

import dataclasses
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from fastbert_hf.data.masking import MaskedLanguageModelCollator
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.files import check_output_folder, file_digest, staged_folder
from fastbert_hf.hub.card import DISTILLATION_PAGE, DISTILLED_FROM, SUMMARY, hub_name
from fastbert_hf.hub.embedder import EMBEDDER_FILES
from fastbert_hf.modeling_fastbert import FastBertForMaskedLM, FastBertForSequenceClassification
from fastbert_hf.training.budget import BudgetClock
from fastbert_hf.training.budget_progress import show_budget
from fastbert_hf.training.checkpoints import check_checkpoint, find_checkpoint, remove_checkpoints
from fastbert_hf.training.distillation.objective import WORDS, HiddenScale
from fastbert_hf.training.distillation.refit import can_be_refitted, refit_student
from fastbert_hf.training.distillation.scores import check_labelled, score, training_labels
from fastbert_hf.training.distillation.settings import DistillationArguments, earlier_run, run_provenance
from fastbert_hf.training.distillation.stages import STAGES, Stages
from fastbert_hf.training.distillation.student import Student, student_of
from fastbert_hf.training.distillation.student_fit import fit_student
from fastbert_hf.training.distillation.teacher import Teacher, copy_embedder, load_teacher
from fastbert_hf.training.distillation.texts import (
    MaskedBatches,
    Text,
    TextBatches,
    in_time,
    in_turn,
    read_examples,
    read_texts,
    split_texts,
)
from fastbert_hf.training.distillation.trainer import DistillationTrainer
from fastbert_hf.training.leaf_balance import leaf_layers
from fastbert_hf.training.provenance import PROVENANCE, Provenance
from fastbert_hf.training.runs import check_options, disable_pin_memory_on_cpu, save_model
from fastbert_hf.training.teaching import without_dropout
from fastbert_hf.training.trainer_hooks import check_hooks
from fastbert_hf.training.tree_usage import counted_visits, tree_usage

FITTED, LAYERS, REFIT = "fitted", "layers", "refit"
MEASURED_TOKENS = 65536  # for the variance of hidden states, and for the usage of leaves
MLM_PROBABILITY = 0.15
# Of budget_minutes, for the layers at most. Runs of ten minutes spent 28 % on them: the fit left a hidden-state error
# of 0.51 to 0.66, and training took 0.11 to 0.19 of it (docs/results.md).
FIT_SHARE = 0.3
SAMPLING_SHARE = 0.2  # of that, for the teacher's pass; their starts from its rows take 3.5 times as long
REFIT_SHARE = 0.1  # of budget_minutes, for solving the output weights at the end
REFIT_SAMPLING_SHARE = 0.2  # of that, for the teacher's pass


@dataclasses.dataclass
class Run:
    """What every stage of a run looks at.

    Attributes:
        options, args: what was asked for. teacher: what is learned from.
        stages: what is done. train, held_out: data sets of batches.
    """

    options: DistillationArguments
    args: TrainingArguments
    teacher: Teacher
    provenance: Provenance
    stages: Stages
    train: Dataset
    held_out: Dataset

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.args.output_dir)

    @property
    def length(self) -> int:
        """Tokens to which texts are cut."""
        return text_length(self.options, self.teacher)


def text_length(options: DistillationArguments, teacher: Teacher) -> int:
    """Tokens to which texts are cut: what was asked for, at most what the teacher is meant for."""
    return min(options.max_seq_length, teacher.max_seq_length)


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
    if options.speed is not None and options.form is None:
        raise ValueError("speed chooses the form by measuring: see fastbert_hf.benchmarks.distilled.form_for_speed")
    folder = check_output_folder(args.output_dir)
    checkpoint = find_checkpoint(args, options.overwrite_output_dir)
    disable_pin_memory_on_cpu(args)
    set_seed(args.seed)
    teacher = load_teacher(options.model_name_or_path)
    for file in options.eval_file:
        check_labelled(file, teacher)
    provenance = run_provenance(options, args, teacher)
    student = student_of(teacher.model, options.student_form)
    check_checkpoint(checkpoint, student.model.config)
    data = _load_text(options, teacher, args.seed)
    if options.overwrite_output_dir:
        _remove_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    provenance.write(folder)
    run = Run(options, args, teacher, provenance, Stages(folder), *data)

    student = _fitted_student(run, student)
    scores = _scores_before(run, student)
    metrics = _train(run, student, checkpoint)
    for file in options.eval_file:
        scores[file]["student"] = score(student.model, teacher, file, run.length)
    return student, teacher, {**_summary(run, student), **metrics, "scores": scores}


def _remove_run(folder: Path) -> None:
    """Remove what an earlier distillation left; a folder of something else stays as it is."""
    if earlier_run(folder) is None:
        return
    remove_checkpoints(folder)
    for name in (FITTED, LAYERS, REFIT):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("config.json", STAGES, SUMMARY, DISTILLATION_PAGE, "README.md", *EMBEDDER_FILES, PROVENANCE):
        (folder / name).unlink(missing_ok=True)


def _load_text(options: DistillationArguments, teacher: Teacher, seed: int) -> tuple[Dataset, Dataset]:
    """Batches to train on and batches held out."""
    draw = random.Random(seed)
    classifies = isinstance(teacher.model, FastBertForSequenceClassification)
    reading = (options.train_file, options.texts_per_file, draw, classifies or options.pairs, not classifies)
    labels: dict[Text, float] = {}
    if options.label_weight:
        label_of, unknown = training_labels(teacher)
        examples = read_examples(*reading, label_of)
        labels = {text: label for text, label in examples if label is not None}
        if not labels:
            raise ValueError(f"label_weight is {options.label_weight:g}, and no row of train_file has a label")
        texts = [text for text, _ in examples]
    else:
        texts = read_texts(*reading)
    parts = split_texts(texts, options.held_out_texts, draw)
    if not parts[1]:
        raise ValueError(f"the text holds {len(parts[0])} different texts; expected at least 10, to hold some back")
    if teacher.prompt:  # of an embedder, which puts it before single texts
        parts = tuple([teacher.prompt + text if isinstance(text, str) else text for text in part] for part in parts)
    sizes = (options.batch_size, min(options.batch_size, len(parts[1])))
    length = text_length(options, teacher)
    batches = []
    for part, size in zip(parts, sizes):
        own = [labels.get(text, unknown) for text in part] if labels else None
        batches.append(TextBatches(part, teacher.tokenizer, length, size, seed, own))
    if isinstance(teacher.model, FastBertForMaskedLM):
        collator = MaskedLanguageModelCollator(teacher.tokenizer, MLM_PROBABILITY, seed)
        batches = [MaskedBatches(part, collator) for part in batches]
    return tuple(batches)


def _fitted_student(run: Run, student: Student) -> Student:
    """The student after its layers were fitted, now or in an earlier part of the run."""
    folder = run.folder / FITTED
    if (folder / "config.json").is_file():
        student = dataclasses.replace(student, model=type(student.model).from_pretrained(folder))
    else:
        with run.stages.timed("fit") as note:
            _fit_layers(run, student, note)
        with staged_folder(folder) as stage:
            student.model.save_pretrained(stage)
            load_tokenizer(run.teacher.folder).save_pretrained(stage)
            copy_embedder(run.teacher.folder, stage)
    shutil.rmtree(run.folder / LAYERS, ignore_errors=True)  # the model has them
    return student


def _fit_layers(run: Run, student: Student, note: Callable[[], None]) -> None:
    options = run.options
    if options.student_form.startswith("layers:"):
        return
    errors = run.stages.get("unexplained", {})
    seconds = math.inf if options.budget_minutes is None else 60 * FIT_SHARE * options.budget_minutes

    def seconds_left() -> float:
        if seconds < math.inf:
            note()
        return seconds - run.stages.seconds("fit")

    def report(layer: int, unexplained: float, seconds: float) -> None:
        errors[str(layer)] = round(unexplained, 4)
        run.stages.put("unexplained", errors)
        note()
        count = run.teacher.model.config.num_hidden_layers
        print(
            f"layer {layer + 1} of {count} fitted in {seconds:.0f} s: it gives {1 - unexplained:.1%} of what the "
            "model lacks there",
            flush=True,
        )

    fit_student(
        student.encoder,
        run.teacher.encoder,
        options.student_form,
        in_time(in_turn(run.train, torch.device("cpu"), options.fit_rows), SAMPLING_SHARE * seconds_left()),
        run.folder / LAYERS,
        options.fit_settings(run.args.seed),
        max_rows=options.fit_rows,
        seconds_left=seconds_left,
        report=report,
    )


def _scores_before(run: Run, student: Student) -> dict[str, dict[str, float]]:
    """Scores of the teacher and of the student after its layers were fitted, by file."""
    scores = run.stages.get("scores", {})
    for file in run.options.eval_file:
        if file not in scores:
            models = {"teacher": run.teacher.model, "fitted": student.model}
            scores[file] = {name: score(model, run.teacher, file, run.length) for name, model in models.items()}
            run.stages.put("scores", scores)
    return {file: dict(scores[file]) for file in run.options.eval_file}


def _train(run: Run, student: Student, checkpoint: str | None) -> dict[str, Any]:
    """Train end to end and save; errors on held-out text before and after."""
    trainer = _trainer(run, student)
    before = run.stages.get("fitted_metrics")
    if before is None:
        before = trainer.measure(run.held_out, "fitted")
        run.stages.put("fitted_metrics", before)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    trainer.begin_part()
    if trainer.clock.fraction < 1:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:  # resumed at its end: the library would take one step more
        trainer.take_over(checkpoint)
    after = trainer.measure(run.held_out)
    if not math.isfinite(after["eval_hidden_error"]):
        raise ValueError("training diverged: the hidden-state error is not finite; try a lower learning rate")
    if run.options.refit and any(can_be_refitted(layer.ffn) for layer in student.encoder.layers):
        after = _refit(run, student, trainer, after)
    save_model(trainer, load_tokenizer(run.teacher.folder))  # one in use keeps how it cut and padded
    copy_embedder(run.teacher.folder, run.folder)
    spent = trainer.clock.spent
    counts = {"train_seconds": round(spent.seconds, 1), "steps": spent.steps, "tokens_seen": spent.tokens}
    return {**before, **after, **counts, "skipped_steps": trainer.skipped_steps}


def _refit(run: Run, student: Student, trainer: DistillationTrainer, before: dict[str, Any]) -> dict[str, Any]:
    """Solve for the output weights, and keep them if the loss on held-out text is lower; what is measured then."""
    layers = student.encoder.layers
    weights = [{name: value.clone() for name, value in layer.ffn.state_dict().items()} for layer in layers]
    minutes = run.options.budget_minutes
    seconds = math.inf if minutes is None else 60 * REFIT_SHARE * REFIT_SAMPLING_SHARE * minutes
    began = time.perf_counter()
    refit_student(
        student,
        run.teacher.encoder,
        in_time(in_turn(run.train, run.args.device, run.options.fit_rows), seconds),
        run.folder / REFIT,
        max_rows=run.options.fit_rows,
        seed=run.args.seed,
    )
    after = trainer.measure(run.held_out)
    losses = [trainer.measured_loss(metrics) for metrics in (before, after)]
    kept = losses[1] < losses[0]
    if not kept:
        for layer, earlier in zip(layers, weights):
            layer.ffn.load_state_dict(earlier)
    print(
        f"output weights solved in {time.perf_counter() - began:.0f} s: held-out loss {losses[0]:.4f} before, "
        f"{losses[1]:.4f} after{'' if kept else '; left as they were'}",
        flush=True,
    )
    found = {"trained_hidden_error": before["eval_hidden_error"], "refit": kept}
    return {**(after if kept else before), **found}


def _trainer(run: Run, student: Student) -> DistillationTrainer:
    options, args = run.options, run.args
    args.per_device_train_batch_size = args.per_device_eval_batch_size = 1  # an item is a batch already
    args.gradient_accumulation_steps = 1
    clock = _clock(run)
    without_dropout(student.model).requires_grad_(True)
    student.encoder.embeddings.requires_grad_(options.train_embeddings)
    for layer in leaf_layers(student.encoder):
        for decision in (layer.router, layer.threshold):
            decision.requires_grad_(options.train_routers)
    trainer = DistillationTrainer(
        student=student,
        teacher=run.teacher.model,
        variance=_hidden_variance(run),
        embed=run.teacher.embed,
        weights={"label_loss": options.label_weight},
        teacher_dtype=options.products_dtype(args.device),
        clock=clock,
        save_minutes=options.save_minutes,
        provenance=run.provenance,
        args=args,
        train_dataset=run.train,
        eval_dataset=run.held_out,
        processing_class=run.teacher.tokenizer,
    )
    held_out = {f"{when}_{name}": f"held-out {words}" for when in ("fitted", "eval") for name, words in WORDS.items()}
    show_budget(trainer, WORDS | held_out)
    return trainer


def _clock(run: Run) -> BudgetClock:
    """What is left of the budget for the end-to-end training.

    Raises:
        ValueError: nothing.
    """
    budget, fit_minutes = run.options.budget_minutes, run.stages.seconds("fit") / 60
    if budget is None:
        return BudgetClock("max_steps", run.args.max_steps)
    minutes = budget * (1 - REFIT_SHARE) if run.options.refit else budget
    if minutes <= fit_minutes:
        raise ValueError(
            f"fitting the layers took {fit_minutes:.1f} minutes: nothing of budget_minutes {budget:g} is left; "
            f"{str(run.folder / FITTED)!r} holds the model so far"
        )
    run.args.max_steps = 2**31 - 1
    return BudgetClock("budget_hours", (minutes - fit_minutes) / 60)


def _hidden_variance(run: Run) -> Tensor:
    encoder = run.teacher.encoder.to(run.args.device)
    scale = HiddenScale(encoder.config.num_hidden_layers, encoder.config.hidden_size)
    with torch.no_grad():
        for batch in in_turn(run.train, run.args.device, MEASURED_TOKENS):
            states = encoder(**batch, output_hidden_states=True).hidden_states
            scale.add(states[1:], batch["attention_mask"])  # the first is the embedding
    return scale.variance()


def _summary(run: Run, student: Student) -> dict[str, Any]:
    options, config = run.options, student.model.config
    student.model.eval()
    with counted_visits(student.encoder) as counts, torch.no_grad():
        for batch in in_turn(run.held_out, run.args.device, MEASURED_TOKENS):
            student.encoder(**batch)
    usage = [layer for layer in tree_usage(counts) if "leaf_fractions" in layer]
    return {
        # a relative path could later be taken for a name on the Hub
        DISTILLED_FROM: hub_name(options.model_name_or_path) or os.path.abspath(options.model_name_or_path),
        "form": options.student_form,
        "neurons_per_token": config.neurons_per_token,
        "neurons_per_layer": config.neurons_per_layer,
        "unexplained_by_layer": list(run.stages.get("unexplained", {}).values()),
        "fit_seconds": run.stages.seconds("fit"),
        "texts": len(run.train) * options.batch_size,
        "dead_leaves": sum(len(layer["dead_leaves"]) for layer in usage),
        "largest_leaf_share": max((max(map(max, layer["leaf_fractions"])) for layer in usage), default=None),
        "learning_rate": run.args.learning_rate,
        "seed": run.args.seed,
        "sources": [{"name": Path(file).name, "sha256": file_digest(file)} for file in options.train_file],
    }
