"""Compare finished pretraining runs: a table, and held-out loss against time and against tokens.

fastbert compare --runs runs/study/1x8-0 runs/study/dense-511-0 --output_dir runs/study/comparison
"""

from dataclasses import dataclass, field

import fastbert_hf  # noqa: F401  registers the configuration with AutoConfig
from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.training.pretraining.comparison import compare


@dataclass
class ComparisonArguments:
    """Options of this command."""

    runs: list[str] = field(
        metadata={"help": "output folders of `fastbert pretrain`, or earlier comparison.json; several seeds count"}
    )
    output_dir: str = field(metadata={"help": "where comparison.md, comparison.json and the plots go"})
    baseline: str | None = field(
        default=None, metadata={"help": 'model to compare with, e.g. "dense 511"; default: the widest dense one'}
    )


def main(argv: list[str] | None = None) -> str:
    """Compare; returns the table."""
    (options,) = RecipeArgumentParser(ComparisonArguments, prog="fastbert compare", description=__doc__).parse(argv)
    table = compare(options.runs, options.baseline, options.output_dir)
    print(table)
    return table
