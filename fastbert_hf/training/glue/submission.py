"""Predictions in the form that the GLUE server (gluebenchmark.com) takes: one .tsv a split, all in one .zip."""

import csv
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fastbert_hf.data.glue import Split, Task
from fastbert_hf.files import write_text

# (task, test split) -> file; the server wants all of them. AX.tsv, its diagnostic set, is not part of the nine tasks.
FILES = {
    ("cola", "test"): "CoLA.tsv",
    ("sst2", "test"): "SST-2.tsv",
    ("mrpc", "test"): "MRPC.tsv",
    ("stsb", "test"): "STS-B.tsv",
    ("qqp", "test"): "QQP.tsv",
    ("mnli", "test_matched"): "MNLI-m.tsv",
    ("mnli", "test_mismatched"): "MNLI-mm.tsv",
    ("qnli", "test"): "QNLI.tsv",
    ("rte", "test"): "RTE.tsv",
    ("wnli", "test"): "WNLI.tsv",
}
NAMED = ("mnli", "qnli", "rte")  # answered with the label's name, the others with its id
SCALE = (0.0, 5.0)  # of STS-B


def prediction_file(folder: Path, task: Task, name: str) -> Path:
    """Where the answers to one test split stand: under GLUE's name for a GLUE task, else <split>.tsv."""
    return folder / FILES.get((task.name, name), f"{name}.tsv")


def write_predictions(folder: Path, task: Task, name: str, split: Split, answers: Sequence) -> Path:
    """Write the answers to one test split.

    Args:
        folder: receives the file.
        task: what was asked.
        name: the split's name.
        split: S rows; their ids go into the file.
        answers: (S,) label ids, or values.

    Returns:
        The file: GLUE's name for a GLUE task, else <split>.tsv with label names. Columns: index, prediction.
    """
    is_glue = (task.name, name) in FILES
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, escapechar="\\")
    table.writerow(("index", "prediction"))
    for number, answer in zip(split.ids, answers, strict=True):
        if task.is_regression:
            low, high = SCALE if is_glue else (float("-inf"), float("inf"))
            shown = f"{min(max(float(answer), low), high):.3f}"
        elif is_glue and task.name not in NAMED:
            shown = int(answer)
        else:
            shown = task.labels[int(answer)]
        table.writerow((number, shown))
    file = prediction_file(folder, task, name)
    write_text(file, text.getvalue())
    return file


def zip_submission(files: Sequence[Path], target: Path) -> list[str]:
    """Put prediction files into one archive.

    Args:
        files: made by `write_predictions`.
        target: the .zip, replaced as a whole.

    Returns:
        Names of the files that the server wants and that are missing.
    """
    temporary = target.with_name(f".{target.name}")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(files):
            archive.write(file, file.name)
    temporary.replace(target)
    return sorted(set(FILES.values()) - {file.name for file in files})
