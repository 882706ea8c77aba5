"""Runs of a few steps, for tests."""

import json
from pathlib import Path

from transformers import TrainingArguments

from fastbert_hf.training.glue.classifier import ModelArguments
from fastbert_hf.training.glue.finetuning import DataTrainingArguments
from fastbert_hf.training.glue.runs import finetune_all
from fastbert_hf.training.pretraining.run import PretrainingArguments


def arguments(tiny, output_dir, **changes):
    """(PretrainingArguments, TrainingArguments) of a run of a few steps; changes go to whichever has the field."""
    options = {
        "model_config": str(tiny / "model.yaml"),
        "tokenizer_name": str(tiny / "tokenizer"),
        "train_file": [str(tiny / "corpus.txt")],
        "validation_fraction": 0.1,
        "max_seq_length": 16,
    }
    training = {
        "output_dir": str(output_dir),
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    for name, value in changes.items():
        (options if name in PretrainingArguments.__dataclass_fields__ else training)[name] = value
    return PretrainingArguments(**options), TrainingArguments(**training)


def losses(folder: Path) -> list[float]:
    """Every loss that a finished run logged."""
    return [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


def run_all(models, glue_dir, output_dir, tasks="sst2", seeds=(), **changes):
    """Fine-tune for a few steps; changes go to whichever options have the field. The summaries."""
    model, data = {"model_name_or_path": [str(path) for path in models]}, {"max_seq_length": 24}
    for name in list(changes):
        for kind, options in ((ModelArguments, model), (DataTrainingArguments, data)):
            if name in kind.__dataclass_fields__ and name in changes:
                options[name] = changes.pop(name)
    if glue_dir is not None:
        data |= {"task_name": tasks, "glue_dir": str(glue_dir)}
    data["seeds"] = list(seeds)
    training = {
        "do_train": True,
        "do_eval": True,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    training |= {"per_device_train_batch_size": 8, "disable_tqdm": True, "use_cpu": True, **changes}
    args = TrainingArguments(output_dir=str(output_dir), **training)
    return finetune_all(ModelArguments(**model), DataTrainingArguments(**data), args)
