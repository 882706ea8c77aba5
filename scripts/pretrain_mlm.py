#!/usr/bin/env python
"""Pretrain a masked language model.

    python scripts/pretrain_mlm.py --config configs/pretrain/demo.yaml --tokenizer_name runs/tokenizer \
        --train_file corpus.txt --output_dir runs/pretrained
"""

import sys
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.training.arguments import RecipeArgumentParser, run_command
from fastbert_hf.training.pretraining.run import PretrainingArguments, pretrain


def main(argv: list[str] | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Parse and train; returns the model and the summary."""
    options, args = RecipeArgumentParser((PretrainingArguments, TrainingArguments), description=__doc__).parse(argv)
    return pretrain(options, args)


if __name__ == "__main__":
    sys.exit(run_command(main))
