"""The nine GLUE tasks, and classification tasks of one's own in the same shape."""

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """What a fine-tuning run must know about its data.

    Attributes:
        name: short name, as in `--task_name`.
        columns: one or two text columns.
        labels: label names in the order of their ids; empty for regression.
        metrics: metric names, the main one first.
        validations: names of the validation files without suffix.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validations: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers on a scale."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier: classes, or 1 for regression."""
        return len(self.labels) or 1


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MATCHED = ("validation_matched", "validation_mismatched")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        Task("stsb", _PAIR, (), ("pearson", "spearman")),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        Task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), validations=_MATCHED),
        Task("qnli", ("question", "sentence"), _ENTAILMENT),
        Task("rte", _PAIR, _ENTAILMENT),
        Task("wnli", _PAIR, ("not_entailment", "entailment")),
    )
}
NOT_FINITE = {f"{sign}{word}" for sign in ("", "+", "-") for word in ("nan", "inf", "infinity")}
HUB_DATASET = "nyu-mll/glue"


@dataclass
class Split:
    """One part of a task's data.

    Attributes:
        name: where it came from, for messages.
        texts: one list per text column, all of S strings.
        labels: S ids, or S floats for regression.
    """

    name: str
    texts: list[list[str]]
    labels: list[int] | list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, limit: int | None) -> "Split":
        """The first `limit` rows; all of them if `limit` is None.

        Raises:
            ValueError: if `limit` is not positive.
        """
        if limit is None:
            return self
        if limit < 1:
            raise ValueError(f"a limit on samples must be at least 1; got {limit}")
        return Split(self.name, [column[:limit] for column in self.texts], self.labels[:limit])


def get_task(name: str) -> Task:
    """Look a GLUE task up.

    Args:
        name: one of the nine names, in any case.

    Returns:
        The task.

    Raises:
        ValueError: for an unknown name.
    """
    if name.lower() not in TASKS:
        raise ValueError(f"unknown GLUE task {name!r}; wanted one of {', '.join(TASKS)}")
    return TASKS[name.lower()]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a table of examples.

    Args:
        path: .jsonl or .json (an object a line), .csv or .tsv (with a header line). Fields of .csv may be quoted,
            quotation marks in .tsv are part of the text.

    Returns:
        One dict a row; values of csv and tsv are strings.

    Raises:
        ValueError: for a missing file, unknown type, malformed line or a file without rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data file {str(path)!r} does not exist")
    try:
        if path.suffix in (".jsonl", ".json"):
            rows = _json_rows(path)
        elif path.suffix in (".csv", ".tsv"):
            # In GLUE's own .tsv files a quotation mark is a character like any other.
            form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, **form))
        else:
            raise ValueError(f"data file {str(path)!r} has an unknown type; wanted .jsonl, .json, .csv or .tsv")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {str(path)!r} is not UTF-8 text: {error}") from error
    except csv.Error as error:
        raise ValueError(f"data file {str(path)!r} is not a table of short fields: {error}") from error
    if not rows:
        raise ValueError(f"data file {str(path)!r} is empty; at least one example is wanted")
    return rows


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: wanted a JSON object; got {line.strip()[:60]!r}")
            rows.append(row)
    return rows


def to_split(rows: Iterable[dict[str, Any]], task: Task, name: str) -> Split:
    """Check rows against a task and turn them into columns.

    Args:
        rows: examples with the task's text columns and `label`: a class id or class name, or a number for
            regression.
        task: what the rows must look like.
        name: where the rows come from, for messages.

    Returns:
        The checked split.

    Raises:
        ValueError: naming the row, for a missing column, a text that is not a string, an unknown label, or no rows.
    """
    split = Split(name, [[] for _ in task.columns])
    for number, row in enumerate(rows, start=1):
        missing = [column for column in (*task.columns, "label") if column not in row]
        if missing:
            wanted = ", ".join((*task.columns, "label"))
            raise ValueError(
                f"{name}, row {number}: column {missing[0]!r} is missing; {task.name} wants {wanted}; "
                f"the row has {', '.join(map(str, row))}"
            )
        for values, column in zip(split.texts, task.columns, strict=True):
            if not isinstance(row[column], str):
                raise ValueError(f"{name}, row {number}: {column!r} must be a text; got {row[column]!r}")
            values.append(row[column])
        split.labels.append(_label(row["label"], task, f"{name}, row {number}"))
    if not split.labels:
        raise ValueError(f"{name} is empty; at least one example is wanted")
    return split


def _label(value: Any, task: Task, where: str) -> int | float:
    if task.is_regression:
        number = _number(value)
        if number is None:
            raise ValueError(f"{where}: the label must be a finite number; got {value!r}")
        return number
    if isinstance(value, str):
        if value in task.labels:
            return task.labels.index(value)
        named_by_numbers = any(_number(label) is not None for label in task.labels)
        value = int(value) if value.isdecimal() and not named_by_numbers else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < task.num_labels:
        wanted = ", ".join(f"{index} ({label})" for index, label in enumerate(task.labels))
        raise ValueError(f"{where}: unknown label {value!r}; {task.name} wants one of {wanted}")
    return value


def _number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # no number; an integer beyond the range of floats
        return None
    return number if math.isfinite(number) else None


def infer_task(rows: list[dict[str, Any]], name: str) -> Task:
    """Describe a task of one's own from its training rows.

    Text columns are sentence1 and sentence2 where both exist, else the first one or two columns besides `label`
    and `idx`. Labels that are all fractional numbers mean regression; otherwise the sorted distinct labels are
    the classes.

    Args:
        rows: training examples.
        name: where they come from, for messages.

    Returns:
        The task, named "own".

    Raises:
        ValueError: if there is no text column or only one class, or naming the row whose label is missing, empty,
            or neither a text nor a finite number.
    """
    columns = [column for column in rows[0] if column not in ("label", "idx")]
    if "label" not in rows[0] or not columns:
        raise ValueError(f"{name}: wanted one or two text columns and 'label'; got {', '.join(map(str, rows[0]))}")
    texts = _PAIR if set(_PAIR) <= set(columns) else tuple(columns[:2])
    labels = [row.get("label") for row in rows]
    for number, label in enumerate(labels, start=1):
        _check_own_label(label, f"{name}, row {number}")
    # Not-a-numbers beside fractions are rows for `to_split` to refuse, not a class.
    if all(_number(label) is not None or str(label).strip().lower() in NOT_FINITE for label in labels) and any(
        isinstance(label, float) or (isinstance(label, str) and "." in label) for label in labels
    ):
        return Task("own", texts, (), ("pearson", "spearman"))
    classes = sorted({str(label) for label in labels}, key=lambda text: (_number(text) is None, _number(text), text))
    if len(classes) < 2:
        raise ValueError(f"{name}: at least two different labels are wanted; all are {classes[0]!r}")
    return Task("own", texts, tuple(classes))


def _check_own_label(label: Any, where: str) -> None:
    if label is None or (isinstance(label, str) and not label.strip()):
        raise ValueError(f"{where}: the label is missing")
    if not isinstance(label, str | bool) and _number(label) is None:
        raise ValueError(f"{where}: the label must be a text or a finite number; got {repr(label)[:60]}")


def load_task_files(task: Task | None, train: str | Path, validations: Iterable[str | Path]):
    """Load a task from explicit files.

    Args:
        task: a known task, or None to describe it from the training file.
        train: training file.
        validations: validation files.

    Returns:
        (task, training split, {file stem: validation split}).

    Raises:
        ValueError: as `read_rows`, `infer_task` and `to_split`.
    """
    validation_rows = {Path(path).stem: (str(path), read_rows(path)) for path in validations}
    rows = read_rows(train)
    own = task is None
    if own:
        task = infer_task(rows, str(train))
    splits = {}
    for stem, (name, part) in {"": (str(train), rows), **validation_rows}.items():
        if own and not task.is_regression:
            # Class names, so that the labels 3 and 5 do not read as ids.
            part = [{**row, "label": str(row["label"])} if "label" in row else row for row in part]
        splits[stem] = to_split(part, task, name)
    return task, splits.pop(""), splits


def load_glue(name: str, glue_dir: str | Path | None = None):
    """Load a GLUE task from a local folder or from the Hub.

    Args:
        name: task name.
        glue_dir: folder with <task>/train.jsonl and <task>/validation.jsonl (MNLI: validation_matched.jsonl and
            validation_mismatched.jsonl); None loads nyu-mll/glue from the Hub or its cache.

    Returns:
        (task, training split, {validation name: split}).

    Raises:
        ValueError: for an unknown task, a missing folder or split, or bad rows.
    """
    task = get_task(name)
    if glue_dir is None:
        return _load_hub(task)
    if not Path(glue_dir).is_dir():
        raise ValueError(f"glue_dir {str(glue_dir)!r} is not a folder")
    folder = Path(glue_dir) / task.name
    files = {split: folder / f"{split}.jsonl" for split in ("train", *task.validations)}
    for split, file in files.items():
        if not file.is_file():
            raise ValueError(f"{task.name} has no {split} split: {str(file)!r} does not exist")
    train = files.pop("train")
    return load_task_files(task, train, files.values())


def _load_hub(task: Task):
    from datasets import load_dataset

    try:
        parts = load_dataset(HUB_DATASET, task.name)
    except Exception as error:  # offline, proxy and Hub failures share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{HUB_DATASET} ({task.name}) cannot be loaded: {reason}; --glue_dir names a local folder instead"
        ) from error
    splits = {name: to_split(parts[name], task, f"{HUB_DATASET} {name}") for name in ("train", *task.validations)}
    return task, splits.pop("train"), splits
