"""Compare distilled models and their controls: quality beside speed, all measured in one run.

fastbert distill compare --runs runs/leaf-0 runs/leaf-1 runs/dense-160-0 runs/dense-1-0 --output_dir runs/comparison
"""

from dataclasses import dataclass, field

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.benchmarks.distilled_runs import compare_distilled
from fastbert_hf.cli.arguments import RecipeArgumentParser


@dataclass
class ComparisonArguments:
    """Options of this command."""

    runs: list[str] = field(metadata={"help": "output folders of `fastbert distill`; seeds of a form count together"})
    output_dir: str = field(metadata={"help": "where comparison.md, comparison.json and comparison.png go"})
    rounds: int = field(default=15, metadata={"help": "of the timing"})


def main(argv: list[str] | None = None) -> str:
    """Compare; returns the table."""
    (options,) = RecipeArgumentParser(
        ComparisonArguments, prog="fastbert distill compare", description=__doc__
    ).parse(argv)
    if options.rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {options.rounds}")
    table = compare_distilled(options.runs, options.output_dir, options.rounds)
    print(table)
    return table
