"""Labelled data: what cannot be scored is named before the work, and a run may go on with other files."""

import json
import re

import pytest

from fastbert_hf.training.distillation.scores import check_labelled
from fastbert_hf.training.distillation.teacher import load_teacher
from tests.training.distillation.runs import distill, save_bert


def write(file, *rows):
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(file)


@pytest.mark.parametrize(("second", "message"), [
    ({"a": "the sea", "score": 2}, "row 2: wanted an object with 'b'"),
    ({"a": "the sea", "b": None, "score": 2}, "row 2: 'b' must be text; got NoneType"),
    ({"a": "the sea", "b": "a stone"}, "has a label that is not a number"),
    ({"a": "the sea", "b": "a stone", "score": float("nan")}, "has a label that is not finite"),
    ({"a": "the sea", "b": "a stone", "score": 1}, "has the label 1 alone; expected different ones"),
])  # fmt: skip
def test_rows_that_cannot_be_scored_are_named(embedder, second, message, tmp_path):
    file = write(tmp_path / "pairs.jsonl", {"a": "grass", "b": "a river", "score": 1}, second)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_labelled(file, load_teacher(str(embedder)))


def test_a_model_of_several_labels_a_text_has_no_score(tiny, tmp_path):
    kind = "multi_label_classification"
    bert = save_bert(tiny, tmp_path / "bert", "ForSequenceClassification", num_labels=3, problem_type=kind)
    file = write(tmp_path / "texts.jsonl", {"text": "the sea", "label": 1}, {"text": "a stone", "label": 2})
    with pytest.raises(ValueError, match="expected one label a text"):
        check_labelled(file, load_teacher(str(bert)))


def test_a_run_goes_on_with_other_labelled_files(tiny, embedder, tmp_path):
    rows = [{"a": "the sea", "b": "a river", "score": 1}, {"a": "grass", "b": "a stone", "score": 2}]
    for name in ("first", "second"):
        file = write(tmp_path / f"{name}.jsonl", *rows)
        summary = distill(embedder, tiny / "corpus.txt", tmp_path / "out", eval_file=file, max_steps=1)
        assert set(summary["scores"]) == {file}
        assert set(summary["scores"][file]) == {"teacher", "fitted", "student"}
