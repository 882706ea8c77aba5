"""The section "serving" of the benchmark."""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastbert_hf.benchmarks.serving.engines import CALIBRATION_TEXTS
from fastbert_hf.benchmarks.serving.measure import Measurement
from fastbert_hf.benchmarks.serving.rows import ServingRow
from fastbert_hf.benchmarks.serving.subjects import BASELINE, GEOMETRIES, Subject, random_subject, trained_subject


@dataclass
class ServingOptions:
    """What is served.

    Attributes:
        original: folder of a model that a user has; without one, random weights in each of `GEOMETRIES` are measured.
        runs: folders of models distilled from it. eval_file: labelled pairs of texts, for quality beside speed.
        sentences: a text file, a sentence a line, for the case of mixed lengths and for calibration.
        entries: a regular expression that the names of entries match; the baseline is always there.
        geometries: those of `GEOMETRIES` that are measured where there is no original; default: all, or one if quick.
    """

    original: str | None = None
    runs: list[str] = field(default_factory=list)
    eval_file: str | None = None
    sentences: str | None = None
    entries: str = ""
    geometries: list[str] = field(default_factory=list)


def serving_rows(
    options: ServingOptions, threads: list[int], quick: bool, report: Callable[[str], None]
) -> Iterator[list[ServingRow]]:
    """Groups of rows, each of one subject and number of threads.

    Raises:
        ValueError: a folder without model, a file without texts.
    """
    with tempfile.TemporaryDirectory(prefix="fastbert-serving-") as folder:
        for number, subject in enumerate(_subjects(options, quick, Path(folder))):
            measurement = Measurement(subject, Path(folder) / f"cache-{number}", 5 if quick else 7, report)
            entries = [
                entry
                for entry in subject.entries(compiled=not quick)
                if entry == BASELINE or re.search(options.entries, entry.name)
            ]
            for count in threads:
                yield from measurement.groups(entries, count, max(threads))


def _subjects(options: ServingOptions, quick: bool, folder: Path) -> Iterator[Subject]:
    if options.original is None:
        for geometry in options.geometries or list(GEOMETRIES)[: 1 if quick else None]:
            yield random_subject(geometry, folder / geometry, quick)
        return
    texts = None
    if options.sentences is not None:
        lines = Path(options.sentences).read_text(encoding="utf-8").splitlines()
        texts = [line.strip() for line in lines if line.strip()]
    count = 30 if quick else CALIBRATION_TEXTS
    yield trained_subject(options.original, options.runs, options.eval_file, texts, quick, count)
