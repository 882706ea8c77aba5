"""Comparing distilled models: the share of the gap, what may be compared, and the files."""

import json

import pytest
import torch

from fastbert_hf import FastBertConfig, FastBertModel, extras
from fastbert_hf.benchmarks import distilled_runs
from fastbert_hf.benchmarks.distilled_runs import compare_distilled, format_runs, load_runs
from fastbert_hf.extras import MissingExtraError


def summary(form, student, **changes):
    scores = {"data/stsb/validation.jsonl": {"teacher": 0.9, "fitted": 0.5, "student": student}}
    found = {"distilled_from": "model", "steps": 10, "form": form, "neurons_per_token": 4, "neurons_per_layer": 8}
    return found | {"scores": scores, "eval_hidden_error": 0.25, "eval_cosine_distance": 0.125} | changes


def write(folder, content):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(content))
    return str(folder)


MILLISECONDS = {
    "1 x 16": {"teacher": 3.0, "leaf:1x4": 1.5, "dense:1": 2.0},
    "32 x 64": {"teacher": 30.0, "leaf:1x4": 15.0, "dense:1": 10.0},
}


def test_the_gap_is_that_between_no_feed_forward_and_the_teacher():
    runs = {"leaf:1x4": [summary("leaf:1x4", 0.8), summary("leaf:1x4", 0.9)], "dense:1": [summary("dense:1", 0.7)]}
    lines = format_runs(runs, MILLISECONDS).splitlines()
    assert lines[2] == "| teacher | all |  | 3.0 | 30.0 | 90.00 | 100 % | 0 | 0 |"
    assert lines[3] == "| dense:1 | 4 of 8 | 1 | 2.0, 1.50x | 10.0, 3.00x | 70.00 | 0 % | 0.250 | 0.125 |"
    assert lines[4] == (
        "| leaf:1x4 | 4 of 8 | 2 | 1.5, 2.00x | 15.0, 2.00x | 85.00 (80.00, 90.00) | 75 % | 0.250 (0.250, 0.250) "
        "| 0.125 (0.125, 0.125) |"
    )
    worse = {**runs, "dense:1": [summary("dense:1", 0.95)]}
    assert "no gap" in format_runs(worse, MILLISECONDS)


def test_only_like_runs_are_compared(tmp_path):
    nothing = write(tmp_path / "a", summary("dense:1", 0.7))
    longer = write(tmp_path / "b", summary("dense:8", 0.8, steps=11))
    other = write(tmp_path / "c", summary("dense:8", 0.8, distilled_from="another"))
    fine = write(tmp_path / "d", summary("dense:8", 0.8))
    assert set(load_runs([nothing, fine])) == {"dense:1", "dense:8"}
    with pytest.raises(ValueError, match="steps is 11 and 10"):
        load_runs([nothing, longer])
    with pytest.raises(ValueError, match="distilled_from is 'another' and 'model'"):
        load_runs([nothing, other])
    unlike = write(tmp_path / "e", summary("dense:8", 0.8, scores={}))
    with pytest.raises(ValueError, match=r"eval_file is \[\] and \['data/stsb/validation\.jsonl'\]"):
        load_runs([nothing, unlike])
    with pytest.raises(ValueError, match="expected a run of --form dense:1"):
        load_runs([fine])
    with pytest.raises(ValueError, match="holds no finished distillation"):
        load_runs([nothing, str(tmp_path)])


def test_what_draws_the_picture_is_asked_for_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        compare_distilled([write(tmp_path / "a", summary("dense:1", 0.7))], str(tmp_path / "out"))


def test_a_comparison_measures_every_form_once_and_writes_table_numbers_and_picture(tmp_path, monkeypatch):
    folders = []
    for number, width in enumerate((1, 8, 8)):
        content = summary(f"dense:{width}", 0.7 + 0.1 * number, distilled_from=str(tmp_path / "teacher"))
        content["scores"] = {str(tmp_path / "data" / file): found for file, found in content["scores"].items()}
        folders.append(write(tmp_path / str(number), content))
        torch.manual_seed(0)
        sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = FastBertModel(FastBertConfig(**sizes, ffn_type="dense", intermediate_size=width))
        model.save_pretrained(folders[-1])

    class Teacher:
        max_seq_length = 64

    monkeypatch.setattr(distilled_runs, "load_teacher", lambda name: Teacher())
    monkeypatch.setattr(distilled_runs, "original_encoder", lambda teacher: model)
    table = compare_distilled(folders, str(tmp_path / "out"), rounds=1)
    out = tmp_path / "out"
    assert (out / "comparison.md").read_text() == table + "\n" and (out / "comparison.png").stat().st_size > 0
    found = json.loads((out / "comparison.json").read_text())
    assert set(found["milliseconds"]) == {"1 x 16", "32 x 64"}  # the teacher reads 64 tokens
    assert all(set(times) == {"teacher", "dense:1", "dense:8"} for times in found["milliseconds"].values())
    assert str(tmp_path) not in (out / "comparison.json").read_text()  # where they lie concerns nobody else
    dense = found["runs"]["dense:8"]
    assert [run["folder"] for run in dense] == ["1", "2"] and dense[0]["distilled_from"] == "teacher"
    assert list(dense[0]["scores"]) == ["stsb/validation.jsonl"]
    assert "| dense:8 | 4 of 8 | 2 |" in table and "85.00 (80.00, 90.00)" in table
