"""Compare fine-tuned students with their dense original: the share of its mean over tasks that each keeps.

fastbert glue compare --results runs/glue --dense original --bare dense-1
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fastbert_hf.cli.arguments import RecipeArgumentParser
from fastbert_hf.files import write_text
from fastbert_hf.training.glue.kept import kept_table
from fastbert_hf.training.glue.settings import SUMMARY
from fastbert_hf.training.glue.table import collect

TABLE = "kept.md"


@dataclass
class ComparisonArguments:
    """Options of this command."""

    results: str = field(metadata={"help": "output folder of `fastbert glue`, of several models; kept.md goes there"})
    dense: str = field(metadata={"help": "name of the dense model there"})
    bare: str | None = field(
        default=None, metadata={"help": "name of the student without feed-forward layers (--form dense:1)"}
    )


def main(argv: list[str] | None = None) -> str:
    """Compare; returns the table."""
    (options,) = RecipeArgumentParser(
        ComparisonArguments, extra="training", prog="fastbert glue compare", description=__doc__
    ).parse(argv)
    files = sorted(Path(options.results).glob(f"*/*/seed-*/{SUMMARY}"))
    if not files:
        raise ValueError(f"{options.results!r} holds no finished run; expected MODEL/TASK/seed-N/{SUMMARY}")
    cells = collect(json.loads(file.read_text(encoding="utf-8")) for file in files)
    table = kept_table(cells, options.dense, options.bare)
    write_text(Path(options.results) / TABLE, table + "\n")
    print(table)
    return table
