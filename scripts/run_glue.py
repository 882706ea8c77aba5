#!/usr/bin/env python
"""Fine-tune and evaluate a classifier on a GLUE task or on data of the same format.

    python scripts/run_glue.py --config configs/glue/paper.yaml --model_name_or_path runs/pretrained \
        --task_name mrpc --glue_dir /path/to/glue --output_dir runs/mrpc
"""

import sys
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.training.arguments import RecipeArgumentParser, run_command
from fastbert_hf.training.finetuning import DataTrainingArguments, ModelArguments, finetune


def main(argv: list[str] | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Parse, train, evaluate; returns the model and the summary."""
    parser = RecipeArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments), description=__doc__)
    return finetune(*parser.parse(argv))


if __name__ == "__main__":
    sys.exit(run_command(main))
