"""The results of many fine-tuning runs as one table, laid out as in the paper."""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastbert_hf.data.glue import TASKS
from fastbert_hf.files import write_text

# (title, task, key of the summary), in the paper's order; the first group makes the average, CoLA the second average
AVERAGED = [
    ("RTE", "rte", "accuracy"),
    ("MRPC", "mrpc", "f1"),
    ("SST-2", "sst2", "accuracy"),
    ("STS-B", "stsb", "pearson"),
    ("MNLI-m", "mnli", "accuracy_validation_matched"),
    ("QNLI", "qnli", "accuracy"),
    ("QQP", "qqp", "f1"),
]
COLA = ("CoLA", "cola", "matthews_correlation")
APART = [("MNLI-mm", "mnli", "accuracy_validation_mismatched"), ("WNLI", "wnli", "accuracy")]
COLUMNS = [*AVERAGED, COLA, *APART]
# rows of the published training and validation splits (dataset card of nyu-mll/glue)
PUBLISHED_ROWS = {
    "cola": (8551, {"": 1043}),
    "sst2": (67349, {"": 872}),
    "mrpc": (3668, {"": 408}),
    "stsb": (5749, {"": 1500}),
    "rte": (2490, {"": 277}),
    "wnli": (635, {"": 71}),
    "qnli": (104743, {"": 5463}),
    "qqp": (363846, {"": 40430}),
    "mnli": (392702, {"_validation_matched": 9815, "_validation_mismatched": 9832}),
}
BASELINE = "constant answer"
OTHER_DATA, AT_CHANCE = "*", "°"


@dataclass(frozen=True)
class Cell:
    """One model's results on one task.

    Attributes:
        model, column: row and column of the table.
        values: the metric of each run, by seed.
        mean, median: of the values.
        spread: their sample standard deviation; None for a single run.
        majority: the metric of an answer that does not depend on the text, see `majority_baseline`.
        published_data: whether training and validation split have as many rows as the published ones.
    """

    model: str
    column: str
    values: dict[int, float]
    mean: float
    median: float
    spread: float | None
    majority: float
    published_data: bool

    @property
    def at_chance(self) -> bool:
        """Whether the mean does not stand above the baseline by more than the spread of the seeds."""
        return self.mean - self.majority <= (self.spread or 0.0)

    def text(self) -> str:
        """The mean in per cent with its spread and marks."""
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        marks = OTHER_DATA * (not self.published_data) + AT_CHANCE * self.at_chance
        return f"{100 * self.mean:.1f}{spread}{marks}"


def _uses_published_rows(run: Mapping[str, Any], key: str) -> bool:
    train, validations = PUBLISHED_ROWS[run["task"]]
    suffix = next((suffix for suffix in validations if suffix and key.endswith(suffix)), "")
    return run["train_examples"] in (0, train) and run[f"examples{suffix}"] == validations[suffix]


def collect(runs: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """Group runs by model and task.

    Args:
        runs: summaries of `finetune` on GLUE tasks.

    Returns:
        A cell for each model, in order of appearance, and each column that it has a result for.

    Raises:
        ValueError: if two runs have the same model, task and seed.
    """
    runs = [run for run in runs if run["task"] in TASKS]
    cells = []
    for model in dict.fromkeys(run["model"] for run in runs):
        for title, task, key in COLUMNS:
            group = [run for run in runs if (run["model"], run["task"]) == (model, task) and key in run]
            if not group:
                continue
            values = {run["seed"]: run[key] for run in group}
            if len(values) != len(group):
                raise ValueError(f"two runs of {model!r} on {task} have the same seed; seeds are {sorted(values)}")
            numbers = list(values.values())
            cells.append(
                Cell(
                    model,
                    title,
                    values,
                    statistics.fmean(numbers),
                    statistics.median(numbers),
                    statistics.stdev(numbers) if len(numbers) > 1 else None,
                    statistics.fmean(run[f"majority_{key}"] for run in group),
                    all(_uses_published_rows(run, key) for run in group),
                )
            )
    return cells


def _average(cells: Mapping[str, float], columns: Sequence[tuple[str, str, str]]) -> str:
    """The mean over the columns that are there; how many, where some are missing."""
    found = [cells[title] for title, *_ in columns if title in cells]
    if not found:
        return ""
    part = "" if len(found) == len(columns) else f" ({len(found)} of {len(columns)})"
    return f"{100 * statistics.fmean(found):.1f}{part}"


def _rows(cells: Sequence[Cell]) -> list[list[str]]:
    titles = [title for title, *_ in COLUMNS if any(cell.column == title for cell in cells)]
    before = [title for title, *_ in AVERAGED if title in titles]
    after = [title for title in titles if title not in (*before, COLA[0])]
    cola = [COLA[0]] if COLA[0] in titles else []
    header = ["model", *before, "average", *cola, "average with CoLA", *after]
    rows = [header]
    for model in dict.fromkeys(cell.model for cell in cells):
        own = {cell.column: cell for cell in cells if cell.model == model}
        texts = {title: cell.text() for title, cell in own.items()}
        rows.append(_row(header, model, texts, {title: cell.mean for title, cell in own.items()}))
    baselines = {cell.column: cell.majority for cell in cells}
    rows.append(_row(header, BASELINE, {t: f"{100 * value:.1f}" for t, value in baselines.items()}, baselines))
    return rows


def _row(header: Sequence[str], name: str, texts: Mapping[str, str], means: Mapping[str, float]) -> list[str]:
    averages = {"average": _average(means, AVERAGED), "average with CoLA": _average(means, [*AVERAGED, COLA])}
    return [name, *({**texts, **averages}.get(title, "") for title in header[1:])]


def _notes(cells: Sequence[Cell]) -> list[str]:
    seeds = sorted({len(cell.values) for cell in cells})
    counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    notes = [
        "Accuracy; F1 for MRPC and QQP, Pearson's correlation for STS-B, Matthews' for CoLA, all times 100, on the "
        f"validation splits. Mean ± sample standard deviation over seeds, runs a cell: {counts}."
    ]
    notes.append("Constant answer: the most frequent training label; for F1 class 1, for correlations one value.")
    if not all(cell.published_data for cell in cells):
        notes.append(f"{OTHER_DATA} not the published number of examples: not comparable with published results.")
    if any(cell.at_chance for cell in cells):
        notes.append(
            f"{AT_CHANCE} at chance: not above the most frequent label by more than the spread of the seeds."
        )
    return notes


def format_table(cells: Sequence[Cell]) -> str:
    """Markdown that also reads well in a terminal: the table, then what its marks mean."""
    rows = _rows(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*lines, "", *_notes(cells)])


def write_table(runs: Iterable[Mapping[str, Any]], folder: str | Path) -> str:
    """Write glue.md, glue.csv and glue.json.

    Args:
        runs: summaries of `finetune`; those of one's own tasks are left out.
        folder: receives the files, each whole or not at all.

    Returns:
        The table as text; empty, and nothing written, if there is no GLUE result.

    Raises:
        ValueError: as `collect`.
    """
    cells = collect(runs)
    if not cells:
        return ""
    text, folder = format_table(cells), Path(folder)
    write_text(folder / "glue.md", text + "\n")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(_rows(cells))
    write_text(folder / "glue.csv", table.getvalue())
    content = [{**asdict(cell), "at_chance": cell.at_chance} for cell in cells]
    write_text(folder / "glue.json", json.dumps(content, indent=2) + "\n")
    return text
