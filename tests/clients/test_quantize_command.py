"""`fastbert quantize`: a prepared folder beside what it is worth and what it costs."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastbert_hf import FastBertForSequenceClassification, FastBertModel, prepare_for_inference
from fastbert_hf.benchmarks.prepared import megabytes
from fastbert_hf.cli import quantize
from tests.clients.helpers import random_batch, tiny_model

LEAVES = {"fff_leaf_width": 5}


def run(model: str, folder, *options: str) -> dict:
    return quantize.main([model, "--output_dir", str(folder), "--rounds", "0", *options])


def write(file, *rows) -> str:
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(file)


@torch.no_grad()
def test_the_folder_is_the_prepared_model_and_the_report_is_of_it(saved, tmp_path, capsys):
    model = tiny_model(FastBertForSequenceClassification, num_labels=2, **LEAVES)
    rows = [
        {"text": text, "label": number % 2} for number, text in enumerate(["one root", "the leaf .", "fast node"])
    ]
    found = run(saved(model), tmp_path / "out", "--eval_file", write(tmp_path / "texts.jsonl", *rows))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    expected = prepare_for_inference(copy.deepcopy(model), "int8")
    assert torch.equal(again(**random_batch(3, 9)).logits, expected(**random_batch(3, 9)).logits)
    assert found["megabytes"]["after"] == round(megabytes(expected), 2) < found["megabytes"]["before"]
    assert set(found["score"]) == {"before", "after"} and found["speed"] == []
    assert 0 < found["output"]["largest_difference"] < found["output"]["largest_value"]
    assert 0 < found["output"]["relative_error"] < 0.2 and 0 <= found["output"]["changed_paths"] < 0.5
    assert json.loads((tmp_path / "out" / "prepared.json").read_text()) == found
    printed = capsys.readouterr().out
    assert "dtype int8, linear layers int8" in printed and "of the paths change" in printed and "score" in printed


@pytest.mark.parametrize("form", [{}, LEAVES, {"ffn_type": "dense", "intermediate_size": 48}])
def test_float32_moves_nothing(form, saved, tmp_path):
    found = run(saved(tiny_model(FastBertModel, **form)), tmp_path / "out", "--dtype", "float32")
    assert found["output"]["relative_error"] < 1e-5
    assert found["output"].get("changed_paths", 0) == 0
    assert ("changed_paths" in found["output"]) is ("ffn_type" not in form)
    assert found["megabytes"]["before"] == found["megabytes"]["after"]


def test_speed_is_of_both_models_in_every_case_that_they_can_take(saved, tmp_path, capsys):
    found = quantize.main([saved(tiny_model(FastBertModel)), "--output_dir", str(tmp_path / "out"), "--rounds", "1"])
    assert [row["case"] for row in found["speed"]] == ["1 x 16"]  # the model has 32 positions
    assert all(row["before_ms"] > 0 and row["after_ms"] > 0 for row in found["speed"])
    assert "times as fast" in capsys.readouterr().out


def test_an_embedder_stays_one(saved, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tmp_path / "embedder"
    sentence_transformers.SentenceTransformer(saved(tiny_model(FastBertModel, **LEAVES)), device="cpu").save(
        str(folder)
    )
    rows = [{"a": "one root", "b": "the leaf .", "score": 1}, {"a": "fast node", "b": "slow node", "score": 2}]
    file = write(tmp_path / "pairs.jsonl", *rows)
    found = run(str(folder), tmp_path / "out", "--linear_dtype", "bfloat16", "--eval_file", file)
    assert (found["dtype"], found["linear_dtype"]) == ("int8", "bfloat16")
    assert 0.9 < found["output"]["least_cosine"] <= found["output"]["mean_cosine"] <= 1 + 1e-6
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert again[0].auto_model.is_prepared and len(again) == 2


def test_what_cannot_be_prepared_is_named_before_anything_is_written(saved, tmp_path):
    folder = saved(tiny_model(FastBertModel, **LEAVES))
    with pytest.raises(ValueError, match="expected another one"):
        run(folder, folder)
    run(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="prepared for inference already"):
        run(str(tmp_path / "out"), tmp_path / "again")
    with pytest.raises(ValueError, match="invalid choice: 'int4'"):
        run(folder, tmp_path / "again", "--dtype", "int4")
    file = write(tmp_path / "texts.jsonl", {"text": "one root", "label": 1})
    with pytest.raises(ValueError, match="has no score"):
        run(folder, tmp_path / "again", "--eval_file", file)
    assert not (tmp_path / "again").exists()
