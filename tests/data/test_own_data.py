"""docs/glue-own-data.md says what becomes of columns and labels; each row of its tables is tried."""

import csv
import json
import re
from pathlib import Path

import pytest

from fastbert_hf.data.glue import load_task_files

PAGE = (Path(__file__).parents[2] / "docs" / "glue-own-data.md").read_text(encoding="utf-8")


def rows_of(first_title):
    """(left, right) of every row of the table whose first column has this title."""
    table = re.search(rf"^\| {first_title} \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table[1].splitlines()]


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


def write(folder, suffix, rows):
    file = folder / f"train{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with open(file, "w", encoding="utf-8", newline="") as target:
            table = csv.DictWriter(target, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".tsv"])
@pytest.mark.parametrize(("columns", "texts"), rows_of("columns"))
def test_columns_become_text_as_documented(tmp_path, columns, texts, suffix, caplog):
    columns, texts = code(columns), code(texts)
    rows = [{name: str(n) if name in ("idx", "label") else f"{name} {n}" for name in columns} for n in (4, 6)]
    data = load_task_files(None, write(tmp_path, suffix, rows))
    assert list(data.task.columns) == texts
    assert data.train.texts == [[f"{name} 4", f"{name} 6"] for name in texts]
    assert data.train.ids == ([4, 6] if "idx" in columns else [0, 1])
    unused = [name for name in columns if name not in (*texts, "label", "idx")]
    assert [message.rsplit("not used: ")[-1] for message in caplog.messages] == (
        [", ".join(unused)] if unused else []
    )


def label_cases():
    """Every row as JSON, and as .csv where a field can hold the values."""
    for labels, task in rows_of("labels"):
        values = [json.loads(value) for value in code(labels)]
        yield ".jsonl", values, task
        if not any(isinstance(value, bool | list) for value in values):
            yield ".csv", values, task


@pytest.mark.parametrize(("suffix", "values", "task"), list(label_cases()))
def test_labels_mean_what_is_documented(tmp_path, suffix, values, task):
    rows = [{"text": f"text {number}", "label": value} for number, value in enumerate(values)]
    file = write(tmp_path, suffix, rows)
    if task.startswith("error: "):
        with pytest.raises(ValueError, match=re.escape(task.removeprefix("error: "))):
            load_task_files(None, file)
        return
    data = load_task_files(None, file)
    if task == "regression":
        assert data.task.is_regression and data.train.labels == [float(value) for value in values]
        assert data.task.metrics == ("pearson", "spearman")
    else:
        assert list(data.task.labels) == code(task) and data.task.metrics == ("accuracy",)
        assert [data.task.labels[label] for label in data.train.labels] == [str(value).strip() for value in values]


def test_the_page_has_its_tables():
    assert len(rows_of("columns")) == 7 and len(rows_of("labels")) == 16


def test_the_validation_file_follows_the_training_file_and_a_test_file_needs_no_label(tmp_path):
    train = write(tmp_path, ".csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    other, test = tmp_path / "dev.jsonl", tmp_path / "new.jsonl"
    other.write_text('{"more": 1, "label": "y", "text": "c"}\n')
    test.write_text('{"text": "d", "label": "of no class"}\n')
    data = load_task_files(None, train, [other], [test])
    assert data.validations["dev"].labels == [1] and data.tests["new"].texts == [["d"]]
    other.write_text('{"label": "z", "text": "c"}\n')
    with pytest.raises(ValueError, match="row 1: unknown label 'z'"):
        load_task_files(None, train, [other])
    for text in (None, 7):
        other.write_text(json.dumps({"text": text, "label": "x"}))
        with pytest.raises(ValueError, match="row 1: 'text' must be a text"):
            load_task_files(None, train, [other])
