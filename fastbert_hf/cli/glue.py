"""Fine-tune and evaluate classifiers on GLUE tasks, or on data of the same form.

    fastbert glue --config glue/paper --model_name_or_path runs/pretrained \
        --task_name mrpc --glue_dir /path/to/glue --output_dir runs/mrpc

Several models, tasks (or "all") and seeds give a run each, in folders of their own, and one table; started again, the
command goes on with the runs that are not finished.
"""

from typing import Any

from transformers import TrainingArguments

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.training.glue.classifier import ModelArguments
from fastbert_hf.training.glue.finetuning import DataTrainingArguments
from fastbert_hf.training.glue.runs import finetune_all


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse, train, evaluate; returns the summaries of all runs."""
    parser = RecipeArgumentParser(
        (ModelArguments, DataTrainingArguments, TrainingArguments),
        extra="training",
        prog="fastbert glue",
        description=__doc__,
    )
    return finetune_all(*parser.parse(argv))
