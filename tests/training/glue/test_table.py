"""The table of many runs: layout, averages, spreads, and the marks that keep it honest."""

import csv
import json

import pytest

from fastbert_hf.training.glue.table import PUBLISHED_ROWS, collect, write_table

KEYS = {"rte": "accuracy", "mrpc": "f1", "sst2": "accuracy", "stsb": "pearson", "qnli": "accuracy", "qqp": "f1"}


def run(model, task, seed, value, majority=0.5, train=None, key=None):
    rows, validations = PUBLISHED_ROWS[task]
    key = key or KEYS.get(task, "matthews_correlation" if task == "cola" else "accuracy")
    return {
        "model": model,
        "task": task,
        "seed": seed,
        "train_examples": rows if train is None else train,
        **{f"examples{suffix}": count for suffix, count in validations.items()},
        key: value,
        f"majority_{key}": majority,
    }


def mnli(model, seed, matched, mismatched):
    one = run(model, "mnli", seed, matched, 0.35, key="accuracy_validation_matched")
    return one | run(model, "mnli", seed, mismatched, 0.35, key="accuracy_validation_mismatched")


def rows_of(folder):
    with open(folder / "glue.csv", newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def test_means_spreads_and_averages_in_the_papers_order(tmp_path):
    runs = [run("a", task, seed, value + 0.01 * seed) for task in KEYS for seed, value in ((0, 0.8), (1, 0.8))]
    runs += [mnli("a", 0, 0.7, 0.6), run("a", "cola", 0, 0.3, 0.0), run("a", "wnli", 0, 0.56, 0.56)]
    text = write_table(runs, tmp_path)
    rows = rows_of(tmp_path)
    assert list(rows["a"]) == [
        *("model", "RTE", "MRPC", "SST-2", "STS-B", "MNLI-m", "QNLI", "QQP", "average"),
        *("CoLA", "average with CoLA", "MNLI-mm", "WNLI"),
    ]
    assert rows["a"]["RTE"] == "80.5 ± 0.7" and rows["a"]["MNLI-m"] == "70.0" and rows["a"]["MNLI-mm"] == "60.0"
    assert rows["a"]["average"] == "79.0"  # (6 * 80.5 + 70) / 7
    assert rows["a"]["average with CoLA"] == "72.9"  # (6 * 80.5 + 70 + 30) / 8
    assert rows["a"]["WNLI"] == "56.0°" and "at chance" in text
    assert rows["constant answer"]["average"] == "47.9"  # (6 * 50 + 35) / 7
    assert "not comparable" not in text
    assert text in (tmp_path / "glue.md").read_text()
    (cell,) = [cell for cell in json.loads((tmp_path / "glue.json").read_text()) if cell["column"] == "RTE"]
    assert cell["values"] == {"0": 0.8, "1": 0.81}
    assert cell["median"] == pytest.approx(0.805) and cell["spread"] == pytest.approx(0.00707, abs=1e-5)


def test_incomplete_averages_say_so_and_other_data_is_marked(tmp_path):
    runs = [run("a", "rte", 0, 0.6), run("b", "rte", 0, 0.7), run("b", "qqp", 0, 0.7, train=20000)]
    text = write_table(runs, tmp_path)
    rows = rows_of(tmp_path)
    assert rows["a"]["average"] == "60.0 (1 of 7)" and rows["b"]["average with CoLA"] == "70.0 (2 of 8)"
    assert rows["b"]["QQP"] == "70.0*" and rows["a"]["QQP"] == "" and "not comparable" in text


def test_chance_is_judged_by_the_spread():
    def judged(*values):
        (cell,) = collect([run("a", "rte", seed, value, 0.53) for seed, value in enumerate(values)])
        return cell.at_chance

    assert judged(0.53) and judged(0.50) and judged(0.52, 0.56)
    assert not judged(0.54) and not judged(0.60, 0.61)


def test_repeated_seeds_are_refused_and_own_tasks_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"two runs of 'a' on rte have the same seed; seeds are \[0\]"):
        collect([run("a", "rte", 0, 0.6), run("a", "rte", 0, 0.7)])
    assert write_table([{"model": "a", "task": "custom", "seed": 0}], tmp_path) == "" and not list(tmp_path.iterdir())
