"""GLUE tasks from local files, and what is wrong with bad ones."""

import json

import pytest

from fastbert_hf.data.glue import TASKS, get_task, load_glue, load_task_files
from fastbert_hf.data.readers import read_rows


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def example(task, label):
    return {**{column: f"a {column}" for column in task.columns}, "label": label, "idx": 0}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_from_the_folder_layout(name, tmp_path):
    task = TASKS[name]
    labels = [0.0, 2.5] if task.is_regression else list(range(task.num_labels))
    for split in ("train", *task.validations):
        write_rows(tmp_path / name / f"{split}.jsonl", [example(task, label) for label in labels])
    data = load_glue(name.upper(), tmp_path)
    train, validations = data.train, data.validations
    assert data.task is task and data.tests == {}
    assert train.labels == labels
    assert train.texts == [[f"a {column}"] * len(labels) for column in task.columns]
    assert tuple(validations) == task.validations


def test_the_table_has_the_published_tasks():
    assert len(TASKS) == 9
    assert {name for name, task in TASKS.items() if len(task.columns) == 1} == {"cola", "sst2"}
    assert [name for name, task in TASKS.items() if task.is_regression] == ["stsb"]
    assert TASKS["mnli"].num_labels == 3 and TASKS["stsb"].num_labels == 1
    assert TASKS["rte"].labels[0] == TASKS["qnli"].labels[0] == "entailment"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("sentence2"), "column 'sentence2' is missing"),
        (lambda row: row.pop("label"), "column 'label' is missing"),
        (lambda row: row.update(sentence1=None), "'sentence1' must be a text; got None"),
        (lambda row: row.update(sentence1=7), "'sentence1' must be a text; got 7"),
        (lambda row: row.update(label=2), "unknown label 2"),
        (lambda row: row.update(label=-1), "unknown label -1"),
        (lambda row: row.update(label="maybe"), "unknown label 'maybe'"),
        (lambda row: row.update(label=None), "unknown label None"),
        (lambda row: row.update(label=True), "unknown label True"),
    ],
)
def test_a_bad_row_is_named_with_its_number(tmp_path, change, message):
    rows = [example(TASKS["rte"], 0), example(TASKS["rte"], 1)]
    write_rows(tmp_path / "rte" / "train.jsonl", rows)
    change(rows[1])
    write_rows(tmp_path / "rte" / "validation.jsonl", rows)
    with pytest.raises(ValueError, match="row 2") as caught:
        load_glue("rte", tmp_path)
    assert message in str(caught.value) and "validation.jsonl" in str(caught.value)


@pytest.mark.parametrize("label", [None, "x", float("nan"), True])
def test_regression_wants_finite_numbers(tmp_path, label):
    for split in ("train", "validation"):
        write_rows(tmp_path / "stsb" / f"{split}.jsonl", [example(TASKS["stsb"], label)])
    with pytest.raises(ValueError, match="finite number"):
        load_glue("stsb", tmp_path)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown GLUE task 'glu'; wanted one of cola"):
        get_task("glu")
    with pytest.raises(ValueError, match="is not a folder"):
        load_glue("rte", tmp_path / "absent")
    write_rows(tmp_path / "mnli" / "train.jsonl", [example(TASKS["mnli"], 0)])
    write_rows(tmp_path / "mnli" / "validation_matched.jsonl", [example(TASKS["mnli"], 0)])
    with pytest.raises(ValueError, match="mnli has no validation_mismatched split"):
        load_glue("mnli", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.csv", "sentence,label\n", "is empty"),
        ("a.jsonl", '{"a": 1}\n{', "line 2: not a JSON object"),
        ("a.jsonl", "[1]\n", "wanted a JSON object"),
        ("a.xml", "<a/>", "unknown type"),
        ("a.csv", "", "is empty"),
        ("a.csv", "\n\n", "is empty"),
        ("a.csv", "text,label\na,1\nwell, really,1\n", "row 2: 3 fields where the header has 2: 'well, really,1'"),
        ("a.csv", 'text,label\n"a\n\nb",1\nshort\n', "row 2: 1 fields where the header has 2: 'short'"),
        ("a.csv", "text,label\na,1,\n", "row 1: 3 fields where the header has 2"),
        ("a.csv", 'text,label\n"never closed,1\nb,0\n', "row 1: 1 fields where the header has 2"),
        ("a.tsv", "text\tlabel\na\t1\tb\n", "row 1: 3 fields where the header has 2.*not be in a .tsv"),
        ("a.csv", "text, text,label\na,b,1\n", "two columns 'text'"),
        ("a.csv", "text,text\na,b\n", "two columns 'text'"),
        ("a.jsonl", '{"text": "a", "text ": "b"}', "two columns 'text'"),
        ("a.csv", b"text,label\n\xff,1\n", "not UTF-8"),
        ("a.csv", b"t\xff,label\na,1\n", "not UTF-8"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value)


def test_own_task_in_csv_and_tsv(tmp_path):
    (tmp_path / "train.csv").write_text('text,label\n"good, really",5\nbad,3\n')
    (tmp_path / "dev.tsv").write_text("text\tlabel\nbad\t3\n")
    data = load_task_files(None, tmp_path / "train.csv", [tmp_path / "dev.tsv"])
    assert data.task.columns == ("text",) and data.task.labels == ("3", "5")
    assert data.train.labels == [1, 0] and data.train.texts == [["good, really", "bad"]]
    assert data.validations["dev"].labels == [0]
    (tmp_path / "dev.tsv").write_text("text\tlabel\nbad\t1\n")
    with pytest.raises(ValueError, match="unknown label '1'"):
        load_task_files(None, tmp_path / "train.csv", [tmp_path / "dev.tsv"])


def test_quotation_marks_in_tsv_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"Hello, he said.\t1\nplain\t0\n"whole"\t1\n')
    rows = read_rows(tmp_path / "a.tsv")
    assert [row["sentence"] for row in rows] == ['"Hello, he said.', "plain", '"whole"']
    assert [row["label"] for row in rows] == ["1", "0", "1"]


def test_own_task_with_fractional_labels_is_regression(tmp_path):
    rows = [{"sentence2": "b", "other": 1, "sentence1": "a", "label": value} for value in (0.5, 3)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    data = load_task_files(None, file, [file])
    task, train = data.task, data.train
    assert task.is_regression and task.columns == ("sentence1", "sentence2")
    assert train.labels == [0.5, 3.0] and train.texts == [["a", "a"], ["b", "b"]]


def test_own_task_needs_text_and_two_classes(tmp_path):
    for rows, message in [
        ([{"label": 1}], "text columns"),
        ([{"text": "a"}], "text columns"),
        ([{"text": "a", "label": "x"}], "two different labels"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], "row 2: the label is missing"),
    ]:
        file = write_rows(tmp_path / "a.jsonl", rows)
        with pytest.raises(ValueError, match=message):
            load_task_files(None, file, [file])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ('""', "row 2: the label is missing"),
        ("NaN", "row 2: the label must be a text or a finite number; got nan"),
        ("-Infinity", "row 2: .* got -inf"),
        ("[1]", r"row 2: .* got \[1\]"),
        ('{"a": 1}', "row 2: .* got {'a': 1}"),
        ("1" + "0" * 400, "row 2: the label must be a text or a finite number; got 1000"),
        ("1" + "0" * 5000, "line 2: not a JSON object"),
        ('"nan"', "row 2: the label must be a finite number; got 'nan'"),
    ],
)
def test_own_task_names_the_row_of_a_bad_label(tmp_path, label, message):
    text = "".join(f'{{"text": "a", "label": {value}}}\n' for value in (0.5, label, 1))
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_task_files(None, tmp_path / "a.jsonl", [tmp_path / "a.jsonl"])
    assert "a.jsonl" in str(caught.value) and len(str(caught.value)) < 400


def test_head_limits_rows(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [example(TASKS["rte"], row % 2) for row in range(5)])
    train = load_task_files(TASKS["rte"], file).train
    assert len(train.head(3)) == len(train.head(3).texts[0]) == 3 and train.head(None) is train
    with pytest.raises(ValueError, match="at least 1"):
        train.head(0)


def test_the_training_split_may_be_missing_where_nobody_trains(tmp_path):
    write_rows(tmp_path / "qnli" / "validation.jsonl", [example(TASKS["qnli"], 1)])
    with pytest.raises(ValueError, match="qnli has no train split"):
        load_glue("qnli", tmp_path)
    data = load_glue("qnli", tmp_path, need_train=False)
    assert data.train is None and len(data.validations["validation"]) == 1


def test_test_splits_have_numbers_and_no_labels(tmp_path):
    for split in ("train", *TASKS["mnli"].validations):
        write_rows(tmp_path / "mnli" / f"{split}.jsonl", [example(TASKS["mnli"], 0)])
    with pytest.raises(ValueError, match="mnli has no test_matched split"):
        load_glue("mnli", tmp_path, need_test=True)
    for split in TASKS["mnli"].tests:
        rows = [{**example(TASKS["mnli"], -1), "idx": number} for number in (7, 3)]
        write_rows(tmp_path / "mnli" / f"{split}.jsonl", rows)
    tests = load_glue("mnli", tmp_path, need_test=True).limited(None, None, 1).tests
    assert tuple(tests) == TASKS["mnli"].tests
    assert tests["test_matched"].ids == [7] and tests["test_matched"].labels == []


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv", ".tsv"])
def test_splits_in_other_formats_read_the_same(tmp_path, suffix):
    rows = [{"sentence": "it's \u00e9t\u00e9, no?", "label": 1, "idx": 4}, {"sentence": "b", "label": 0, "idx": 5}]
    folder = tmp_path / "cola"
    folder.mkdir()
    write_rows(folder / "validation.jsonl", rows)
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(rows)
    target = str(folder / f"train{suffix}")
    if suffix == ".json":
        (folder / "train.json").write_text(json.dumps(rows))
    elif suffix == ".parquet":
        table.to_parquet(target)
    else:
        table.to_csv(target, sep="\t" if suffix == ".tsv" else ",")
    data = load_glue("cola", tmp_path)
    assert (data.train.texts, data.train.labels, data.train.ids) == (
        data.validations["validation"].texts,
        data.validations["validation"].labels,
        [4, 5],
    )
    write_rows(folder / "train.jsonl", rows)
    with pytest.raises(ValueError, match="train split twice"):
        load_glue("cola", tmp_path)


def test_a_cut_parquet_file_and_a_list_of_others_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"'.*a[.]parquet' is no whole Parquet file"):
        read_rows(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="entry 1: wanted a JSON object; got 1"):
        read_rows(tmp_path / "a.json")
