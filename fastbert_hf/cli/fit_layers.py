"""Fit trees and narrow dense layers to a dense layer of a trained model: a table of what each leaves unexplained.

fastbert distill fit-layers --model_name_or_path MODEL --layer 2 --train_file text.txt --other_file other.txt \
    --forms leaf:5x96 dense:96 tree:1x8 --output_dir runs/fit
"""

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.training.distillation.fit_table import LayerFitArguments, fit_table, format_table


def main(argv: list[str] | None = None) -> str:
    """Parse and fit; returns the table."""
    (options,) = RecipeArgumentParser(
        LayerFitArguments, extra="training", prog="fastbert distill fit-layers", description=__doc__
    ).parse(argv)
    table = format_table(fit_table(options))
    print(table)
    return table
