"""Pretrain a masked language model.

    fastbert pretrain --config pretrain/demo --tokenizer_name runs/tokenizer \
        --train_file corpus.txt --output_dir runs/pretrained
"""

from typing import Any

from transformers import PreTrainedModel, TrainingArguments

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.training.pretraining.run import PretrainingArguments, pretrain


def main(argv: list[str] | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Parse and train; returns the model and the summary."""
    options, args = RecipeArgumentParser(
        (PretrainingArguments, TrainingArguments), extra="training", prog="fastbert pretrain", description=__doc__
    ).parse(argv)
    return pretrain(options, args)
