"""What the GLUE server is given."""

import zipfile

import numpy as np
import pytest

from fastbert_hf.data.glue import TASKS, Split, Task
from fastbert_hf.training.glue.submission import FILES, write_predictions, zip_submission


@pytest.mark.parametrize(
    ("task", "split", "answers", "file", "shown"),
    [
        ("cola", "test", [1, 0], "CoLA.tsv", ["1", "0"]),
        ("rte", "test", [1, 0], "RTE.tsv", ["not_entailment", "entailment"]),
        ("mnli", "test_mismatched", [2, 1], "MNLI-mm.tsv", ["contradiction", "neutral"]),
        ("wnli", "test", [1, 0], "WNLI.tsv", ["1", "0"]),
        ("stsb", "test", np.array([5.2, 1.23456]), "STS-B.tsv", ["5.000", "1.235"]),
    ],
)
def test_files_have_the_servers_names_ids_and_labels(tmp_path, task, split, answers, file, shown):
    rows = Split("x", [["a", "b"]], [], [7, 3])
    path = write_predictions(tmp_path, TASKS[task], split, rows, answers)
    assert path == tmp_path / file
    assert path.read_text() == f"index\tprediction\n7\t{shown[0]}\n3\t{shown[1]}\n"


def test_own_tasks_keep_their_names_and_scale(tmp_path):
    rows = Split("x", [["a"]], [], [0])
    assert write_predictions(tmp_path, Task("custom", ("t",), ("x", "y z")), "dev", rows, [1]).name == "dev.tsv"
    assert (tmp_path / "dev.tsv").read_text() == "index\tprediction\n0\ty z\n"
    write_predictions(tmp_path, Task("custom", ("t",), ()), "dev", rows, [-7.5])
    assert (tmp_path / "dev.tsv").read_text() == "index\tprediction\n0\t-7.500\n"


def test_the_archive_holds_the_files_and_missing_ones_are_named(tmp_path):
    rows = Split("x", [["a"]], [], [0])
    files = [write_predictions(tmp_path / "p", TASKS[task], split, rows, [0]) for task, split in FILES]
    assert len({file.name for file in files}) == 10  # nine tasks, one of them with two test splits
    assert zip_submission(files, tmp_path / "all.zip") == []
    assert zip_submission(files[1:], tmp_path / "some.zip") == ["CoLA.tsv"]
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert sorted(archive.namelist()) == sorted(FILES.values())
        assert archive.read("CoLA.tsv") == b"index\tprediction\n0\t0\n"
