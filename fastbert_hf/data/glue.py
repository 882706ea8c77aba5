"""The nine GLUE tasks, and classification tasks of one's own in the same shape."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert_hf.data.readers import TABLE_SUFFIXES, read_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What a fine-tuning run must know about its data.

    Attributes:
        name: short name, as in `--task_name`.
        columns: one or two text columns.
        labels: label names in the order of their ids; empty for regression.
        metrics: metric names, the main one first.
        validations: names of the validation files without suffix.
        tests: likewise, of those without labels.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validations: tuple[str, ...] = ("validation",)
    tests: tuple[str, ...] = ("test",)

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
_MATCHED_TESTS = ("test_matched", "test_mismatched")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        Task("stsb", _PAIR, (), ("pearson", "spearman")),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validations=_MATCHED,
            tests=_MATCHED_TESTS,
        ),
        Task("qnli", ("question", "sentence"), _ENTAILMENT),
        Task("rte", _PAIR, _ENTAILMENT),
        Task("wnli", _PAIR, ("not_entailment", "entailment")),
    )
}
NOT_FINITE = {f"{sign}{word}" for sign in ("", "+", "-") for word in ("nan", "inf", "infinity")}
HUB_DATASET = "nyu-mll/glue"
CUSTOM = "custom"  # name of the task that files of one's own are


@dataclass
class Split:
    """One part of a task's data.

    Attributes:
        name: where it came from, for messages.
        texts: one list per text column, all of S strings.
        labels: S ids, or S floats for regression; none in a test split.
        ids: S numbers that a submission calls the rows by.
    """

    name: str
    texts: list[list[str]]
    labels: list[int] | list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts[0])

    def head(self, limit: int | None) -> "Split":
        """The first `limit` rows; all of them if `limit` is None.

        Raises:
            ValueError: if `limit` is not positive.
        """
        if limit is None:
            return self
        if limit < 1:
            raise ValueError(f"a limit on samples must be at least 1; got {limit}")
        texts = [column[:limit] for column in self.texts]
        return Split(self.name, texts, self.labels[:limit], self.ids[:limit])


@dataclass(frozen=True)
class TaskData:
    """A task and its examples.

    Attributes:
        task: what the data looks like.
        train: training split, or None where it was neither wanted nor there.
        validations: validation splits by name.
        tests: test splits by name; empty unless they were wanted.
    """

    task: Task
    train: Split | None
    validations: dict[str, Split]
    tests: dict[str, Split] = field(default_factory=dict)

    def suffix(self, name: str) -> str:
        """What follows a metric's name in the summary for one of the validation splits."""
        return f"_{name}" if len(self.validations) > 1 else ""

    def limited(self, train: int | None, validation: int | None, test: int | None) -> "TaskData":
        """The first rows of each split; None leaves a split whole.

        Raises:
            ValueError: if a limit is not positive.
        """
        return TaskData(
            self.task,
            self.train and self.train.head(train),
            {name: split.head(validation) for name, split in self.validations.items()},
            {name: split.head(test) for name, split in self.tests.items()},
        )


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


def to_split(rows: Iterable[dict[str, Any]], task: Task, name: str, labelled: bool = True) -> Split:
    """Check rows against a task and turn them into columns.

    Args:
        rows: examples with the task's text columns and `label`: a class id or class name, or a number for
            regression.
        task: what the rows must look like.
        name: where the rows come from, for messages.
        labelled: False for test rows, whose labels nobody has.

    Returns:
        The checked split.

    Raises:
        ValueError: naming the row, for a missing column, a text that is not a string, an unknown label, or no rows.
    """
    split = Split(name, [[] for _ in task.columns])
    columns = (*task.columns, "label") if labelled else task.columns
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if column not in row]
        if missing:
            wanted = ", ".join(columns)
            raise ValueError(
                f"{name}, row {number}: column {missing[0]!r} is missing; {task.name} wants {wanted}; "
                f"the row has {', '.join(map(str, row))}"
            )
        for values, column in zip(split.texts, task.columns, strict=True):
            if not isinstance(row[column], str):
                raise ValueError(f"{name}, row {number}: {column!r} must be a text; got {row[column]!r}")
            values.append(row[column])
        if labelled:
            split.labels.append(_label(row["label"], task, f"{name}, row {number}"))
        split.ids.append(_row_id(row.get("idx"), number - 1))
    if not len(split):
        raise ValueError(f"{name} is empty; expected at least one example")
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


def _row_id(value: Any, position: int) -> int:
    """What a submission calls a row: its idx, or its position where it has none."""
    number = _number(value)
    return position if number is None or number != int(number) else int(number)


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
    """Describe a task of one's own from its training rows; docs/glue-own-data.md says the same for users.

    Text columns are sentence1 and sentence2 where both exist, else the first one or two columns besides `label`
    and `idx`; a warning names columns that are left out. Labels that are all numbers, at least one of them written
    as a fraction, mean regression; otherwise the sorted distinct labels are the classes. A warning names classes
    that differ in case alone.

    Args:
        rows: training examples.
        name: where they come from, for messages.

    Returns:
        The task, named CUSTOM.

    Raises:
        ValueError: if there is no text column, or a column without a name, or only one class, or naming the row
            whose label is missing, empty, or neither a text nor a finite number.
    """
    columns = [column for column in rows[0] if column not in ("label", "idx")]
    if "label" not in rows[0] or not columns:
        raise ValueError(f"{name}: wanted one or two text columns and 'label'; got {', '.join(map(str, rows[0]))}")
    texts = _PAIR if set(_PAIR) <= set(columns) else tuple(columns[:2])
    if "" in texts:
        place = list(rows[0]).index("") + 1
        raise ValueError(f"{name}: column {place} has no name; wanted the name of a text, or idx for numbers of rows")
    if unused := [column for column in columns if column not in texts]:
        logger.warning("%s: the text is %s; not used: %s", name, " and ".join(texts), ", ".join(unused))
    labels = [row.get("label") for row in rows]
    for number, label in enumerate(labels, start=1):
        _check_own_label(label, f"{name}, row {number}")
    # Not-a-numbers beside fractions are rows for `to_split` to refuse, not a class.
    if all(_number(label) is not None or str(label).strip().lower() in NOT_FINITE for label in labels) and any(
        isinstance(label, float) or (isinstance(label, str) and "." in label) for label in labels
    ):
        return Task(CUSTOM, texts, (), ("pearson", "spearman"))
    classes = sorted({str(label) for label in labels}, key=lambda text: (_number(text) is None, _number(text), text))
    if len(classes) < 2:
        raise ValueError(f"{name}: at least two different labels are wanted; all are {classes[0]!r}")
    spellings: dict[str, list[str]] = {}
    for label in classes:
        spellings.setdefault(label.casefold(), []).append(label)
    for alike in (group for group in spellings.values() if len(group) > 1):
        logger.warning("%s: labels that differ in case alone are different classes: %s", name, ", ".join(alike))
    return Task(CUSTOM, texts, tuple(classes))


def _check_own_label(label: Any, where: str) -> None:
    if label is None or (isinstance(label, str) and not label.strip()):
        raise ValueError(f"{where}: the label is missing")
    if not isinstance(label, str | bool) and _number(label) is None:
        raise ValueError(f"{where}: the label must be a text or a finite number; got {repr(label)[:60]}")


def load_task_files(
    task: Task | None,
    train: str | Path | None,
    validations: Iterable[str | Path] = (),
    tests: Iterable[str | Path] = (),
) -> TaskData:
    """Load a task from explicit files.

    Args:
        task: a known task, or None to describe it from the training file (the first validation file without one).
        train: training file, or None.
        validations: validation files.
        tests: files without labels.

    Returns:
        The task and its splits, validation and test splits by file stem.

    Raises:
        ValueError: as `read_rows`, `infer_task` and `to_split`, or if there is no file with labels.
    """
    tables = {"train": [train] if train else [], "validation": list(validations), "test": list(tests)}
    rows = {part: [(str(path), read_rows(path)) for path in paths] for part, paths in tables.items()}
    labelled = rows["train"] + rows["validation"]
    if not labelled:
        raise ValueError("no data with labels; expected a training or a validation file")
    own = task is None
    if own:
        task = infer_task(labelled[0][1], labelled[0][0])
    splits: dict[str, list[Split]] = {}
    for part, files in rows.items():
        splits[part] = []
        for name, table in files:
            if own and not task.is_regression:
                # Class names, so that the labels 3 and 5 do not read as ids.
                table = [{**row, "label": str(row["label"])} if "label" in row else row for row in table]
            splits[part].append(to_split(table, task, name, labelled=part != "test"))

    def by_stem(part: str) -> dict[str, Split]:
        return {Path(path).stem: split for path, split in zip(tables[part], splits[part], strict=True)}

    return TaskData(task, next(iter(splits["train"]), None), by_stem("validation"), by_stem("test"))


def load_glue(
    name: str, glue_dir: str | Path | None = None, need_train: bool = True, need_test: bool = False
) -> TaskData:
    """Load a GLUE task from a local folder or from the Hub.

    Args:
        name: task name.
        glue_dir: folder with <task>/train.jsonl and <task>/validation.jsonl (MNLI: validation_matched and
            validation_mismatched); .json, .parquet, .csv and .tsv with a header are read as well. None loads
            nyu-mll/glue from the Hub or its cache.
        need_train: whether a missing training split is an error.
        need_test: load the test split (MNLI: test_matched and test_mismatched) too, an error if there is none.

    Returns:
        The task and its splits.

    Raises:
        ValueError: for an unknown task, a missing folder or split, or bad rows.
    """
    task = get_task(name)
    if glue_dir is None:
        return _load_hub(task, need_test)
    if not Path(glue_dir).is_dir():
        raise ValueError(f"glue_dir {str(glue_dir)!r} is not a folder")
    folder = Path(glue_dir) / task.name
    train = _split_file(folder, "train", task, need_train)
    validations = [_split_file(folder, split, task) for split in task.validations]
    tests = [_split_file(folder, split, task) for split in task.tests] if need_test else []
    return load_task_files(task, train, validations, tests)


def _split_file(folder: Path, split: str, task: Task, needed: bool = True) -> Path | None:
    files = [folder / f"{split}{suffix}" for suffix in TABLE_SUFFIXES]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        raise ValueError(
            f"{task.name} has its {split} split twice: {found[0].name} and {found[1].name} in {str(folder)!r}"
        )
    if needed and not found:
        raise ValueError(f"{task.name} has no {split} split: {str(files[0])!r} does not exist")
    return found[0] if found else None


def _load_hub(task: Task, need_test: bool) -> TaskData:
    from datasets import load_dataset

    try:
        parts = load_dataset(HUB_DATASET, task.name)
    except Exception as error:  # offline, proxy and Hub failures share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{HUB_DATASET} ({task.name}) cannot be loaded: {reason}; --glue_dir names a local folder instead"
        ) from error

    def split(name: str, labelled: bool = True) -> Split:
        return to_split(parts[name], task, f"{HUB_DATASET} {name}", labelled)

    return TaskData(
        task,
        split("train"),
        {name: split(name) for name in task.validations},
        {name: split(name, labelled=False) for name in task.tests} if need_test else {},
    )
