"""What the pages speak of, tiny: functions that put it at a path, and others that make what a command does small."""

import csv
import functools
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbert_hf.benchmarks import machine
from fastbert_hf.benchmarks.serving import section, subjects
from fastbert_hf.data.glue import TASKS
from fastbert_hf.training.budget import UNITS
from tests.benchmarks.test_benchmarks import CEILINGS
from tests.benchmarks.test_serving import TINY, Near
from tests.hub.conftest import published_files, save_tokenizer
from tests.pages.conftest import Made
from tests.pages.pages import ROOT
from tests.training.conftest import write_split

Lay = Callable[[Made, Path], object]
ROWS = 12  # of tables


def copy_of(name: str) -> Lay:
    """One of the folders of `Made`."""
    return lambda made, path: shutil.copytree(getattr(made, name), path)


def checkout(made: Made, path: Path) -> None:
    """The folder of this name of the repository."""
    path.symlink_to(ROOT / path.name)


def published(made: Made, path: Path) -> None:
    """A small model in the published layout, with a tokenizer."""
    path.mkdir()
    for file, content in published_files().items():
        (path / file).write_bytes(content)
    save_tokenizer(path)


def texts(made: Made, path: Path) -> None:
    """A text a line, compressed where the name says so."""
    path.write_bytes(lzma.compress(made.text.read_bytes()) if path.suffix == ".xz" else made.text.read_bytes())


def lines(made: Made) -> list[str]:
    return made.text.read_text(encoding="utf-8").splitlines()[:ROWS]


def pairs(made: Made, path: Path) -> None:
    """Pairs of texts with a score."""
    columns = zip(lines(made), lines(made)[1:])
    write_split(path, [{"sentence1": a, "sentence2": b, "score": i % 5} for i, (a, b) in enumerate(columns)])


def table(made: Made, path: Path) -> None:
    """Texts with a label, without one in a test file."""
    columns = ("text", "label")[: 1 if path.stem == "test" else 2]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *((text, i % 2)[: len(columns)] for i, text in enumerate(lines(made)))])


def glue(made: Made, path: Path) -> None:
    """All tasks of GLUE."""
    for task in TASKS.values():
        labels = [i % len(task.labels) if task.labels else i / 2 for i in range(ROWS)]
        rows = [dict.fromkeys(task.columns, text) | {"label": i} for text, i in zip(lines(made), labels)]
        for split in ("train", *task.validations):
            write_split(path / task.name / f"{split}.jsonl", rows)


def short_hours(patch: pytest.MonkeyPatch) -> None:
    """Trainings whose hour lasts a microsecond: they end with the first step."""
    patch.setitem(UNITS, "budget_hours", ("seconds", 1e-6))


def small_benchmark(patch: pytest.MonkeyPatch) -> None:
    """Tiny models of random weights, few tokens, and engines in this process, whose clock only counts calls."""
    for geometry in subjects.GEOMETRIES:
        patch.setitem(subjects.GEOMETRIES, geometry, TINY)
    patch.setattr(subjects, "QUICK_SHAPES", ((1, 8),))
    patch.setattr(section, "Measurement", functools.partial(section.Measurement, start=Near))
    patch.setattr(machine, "ceilings", lambda threads: CEILINGS)
