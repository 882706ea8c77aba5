"""The options of a distillation: what is distilled into what, on which text, and how long."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import TrainingArguments

from fastbert_hf.data.tokenizer import tokenizer_digest
from fastbert_hf.files import file_digest
from fastbert_hf.training.budget import falling
from fastbert_hf.training.distillation.layer_fit import FitSettings
from fastbert_hf.training.distillation.objective import WEIGHTS
from fastbert_hf.training.distillation.student import check_student_form, form_of
from fastbert_hf.training.distillation.teacher import Teacher, embedder_digest, fast_dtype
from fastbert_hf.training.distillation.texts import check_text_files
from fastbert_hf.training.leaf_balance import check_balance
from fastbert_hf.training.provenance import (
    PROVENANCE,
    Provenance,
    as_json,
    check_same_settings,
    training_settings,
    weights_identity,
)

TEACHER_DTYPES = ("auto", "float32", "bfloat16")
# what a run may go on with, or what digests stand for
NOT_COMPARED = (
    "overwrite_output_dir", "budget_minutes", "save_minutes", "model_name_or_path", "train_file", "eval_file",
)  # fmt: skip
REPLACED = (
    "gradient_accumulation_steps", "max_steps", "num_train_epochs", "ignore_data_skip", "do_train",
    "per_device_train_batch_size", "save_strategy", "save_steps", "eval_strategy", "eval_steps",
)  # fmt: skip
# what runs of an earlier version did, which do not say
ABSENT = {
    "loss_weights": WEIGHTS | {"cosine_distance": 10.0, "similarity_error": 10.0},
    "train_routers": True,
}
# options of Trainer that a distillation has no use for, and what there is in their place
UNUSED = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    "num_train_epochs": "budget_minutes or max_steps",
    "lr_scheduler_type": "the rate follows the budget",
    "warmup_steps": "the rate follows the budget",
    "load_best_model_at_end": "the last model is the result",
    "push_to_hub": "push the finished folder",
}


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
        default=None, metadata={"help": "minutes to fit and train; exactly one of this and --max_steps"}
    )
    speed: float | None = field(
        default=None,
        metadata={"help": "times the speed of the original at 1 x 128 tokens: chooses fff_leaf_width by measuring"},
    )
    texts_per_file: int = field(default=100_000, metadata={"help": "texts taken from each file, at random, at most"})
    pairs: bool = field(
        default=False,
        metadata={
            "help": "read rows of two texts as pairs too, for a student that will be fine-tuned on pairs; of a "
            "classifier's rows nothing else is read"
        },
    )
    held_out_texts: int = field(default=1000, metadata={"help": "texts kept back to measure on, at most"})
    max_seq_length: int = field(default=128, metadata={"help": "longer texts are cut to this many tokens"})
    batch_size: int = field(default=48, metadata={"help": "texts of an optimizer step"})
    fit_rows: int = field(
        default=100_000, metadata={"help": "tokens on which each layer is fitted, and refitted, at most"}
    )
    fit_steps: int = field(default=800, metadata={"help": "steps of each layer's fit; 0 leaves the start from data"})
    fit_rows_per_step: int = field(default=1024, metadata={"help": "tokens of each"})
    fit_learning_rate: float = field(default=1e-3, metadata={"help": "of each layer's fit"})
    balance_leaves: float = field(
        default=0.5, metadata={"help": "rate at which thresholds follow medians while layers are fitted; 0: never"}
    )
    refit: bool = field(
        default=False,
        metadata={
            "help": "solve for the output weights of leaves and dense layers after the training, in a tenth of "
            "budget_minutes, and keep them if held-out text is better for it: of use after short trainings"
        },
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={"help": "of the teacher's products in training: float32, bfloat16; auto: what is fast here"},
    )
    label_weight: float = field(
        default=0.0,
        metadata={
            "help": "of the loss on labels of train_file (label, score or labels), for classifiers; 0: not read"
        },
    )
    train_embeddings: bool = field(default=False, metadata={"help": "train the embeddings too"})
    train_routers: bool = field(
        default=False,
        metadata={"help": "train the routers of leaf trees end to end too; tokens then gather on few leaves"},
    )
    save_minutes: float = field(default=5.0, metadata={"help": "minutes between two checkpoints"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove what an earlier run left in output_dir instead of going on with it"}
    )

    @property
    def student_form(self) -> str:
        """The student's feed-forward layers."""
        return self.form or form_of(self.fff_trees, self.fff_depth, self.fff_leaf_width)

    def products_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of the teacher's products in training on a device."""
        return fast_dtype(device) if self.teacher_dtype == "auto" else getattr(torch, self.teacher_dtype)

    def fit_settings(self, seed: int) -> FitSettings:
        """How each layer is fitted."""
        return FitSettings(self.fit_steps, self.fit_rows_per_step, self.fit_learning_rate, self.balance_leaves, seed)

    def check(self, args: TrainingArguments) -> None:
        """Check what can be checked before anything is read.

        Raises:
            ValueError: naming the option.
        """
        check_student_form(self.student_form)
        for name in ("texts_per_file", "batch_size", "held_out_texts", "fit_rows", "fit_rows_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("fit_steps", "save_minutes", "label_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be zero or above; got {getattr(self, name)}")
        check_balance(self.balance_leaves)
        if self.teacher_dtype not in TEACHER_DTYPES:
            raise ValueError(f"teacher_dtype must be one of {', '.join(TEACHER_DTYPES)}; got {self.teacher_dtype!r}")
        if (self.budget_minutes is None) == (args.max_steps <= 0):
            raise ValueError("expected exactly one of --budget_minutes and --max_steps")
        for name in ("budget_minutes", "speed", "fit_learning_rate"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        _check_training(args)
        check_text_files(self.train_file)


def _check_training(args: TrainingArguments) -> None:
    """Check that nothing is asked of the Trainer that would be left out without a word."""
    defaults = {entry.name: entry.default for entry in fields(TrainingArguments)}
    for name, instead in UNUSED.items():
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"{name} is {getattr(args, name)}; a distillation does not use it: {instead}")
    if (devices := max(args.n_gpu, args.world_size)) > 1:
        raise ValueError(f"a distillation runs in one process on one device; got {devices} of them")


def earlier_run(folder: Path) -> Provenance | None:
    """What the distillation in a folder is made with; None where there is none."""
    found = Provenance.read(folder) if (folder / PROVENANCE).is_file() else None
    return None if found is None or "fit_rows" not in found.settings else found


def earlier_form(options: DistillationArguments, folder: Path) -> str | None:
    """The form that the run in a folder found for the same `speed`: another measurement could find another one."""
    earlier = None if options.overwrite_output_dir else earlier_run(folder)
    settings = {} if earlier is None else earlier.settings
    return settings.get("form") if settings.get("speed") == options.speed else None


def run_provenance(options: DistillationArguments, args: TrainingArguments, teacher: Teacher) -> Provenance:
    """What the run is made with; one that goes on must be made with the same. Nothing is changed.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    settings = training_settings(args, REPLACED)
    settings |= {name: value for name, value in vars(options).items() if name not in NOT_COMPARED}
    settings |= {"form": options.student_form, "text": [file_digest(file) for file in options.train_file]}
    settings |= {"schedule": falling.__name__, "loss_weights": WEIGHTS}
    settings |= {"tokenizer": tokenizer_digest(teacher.tokenizer)}
    settings["model"] = weights_identity(str(teacher.folder), teacher.model.config)
    settings["embedder"] = embedder_digest(teacher.folder)
    settings = as_json(settings)
    folder = Path(args.output_dir)
    earlier = earlier_run(folder)
    if earlier is not None and options.overwrite_output_dir:
        return Provenance(settings)
    if earlier is not None:
        check_same_settings(ABSENT | earlier.settings, settings, str(folder))
        return Provenance(settings, earlier.parts)
    if (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds a model that is not of a distillation; choose another output_dir")
    return Provenance(settings)
