"""One output folder holds one run: other settings are refused, other work on the same run is done."""

import dataclasses
import json
import shutil
import zipfile

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainingArguments

from fastbert_hf.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece
from fastbert_hf.training.glue.classifier import ModelArguments
from fastbert_hf.training.glue.options import DataTrainingArguments
from fastbert_hf.training.glue.settings import FREE
from tests.training.conftest import write_split
from tests.training.runs import run_all

SAVED = {"save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module")
def finished(pretrained, glue_dir, tmp_path_factory):
    """A folder that holds one run, alone in it."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    run_all([pretrained], glue_dir, folder, **SAVED)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "out")


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate is 0.01 there, 0.001 here"),
        ({"seed": 7}, "seed is 42 there, 7 here"),
        ({"data_seed": 7}, "data_seed is None there, 7 here"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is None there, 5.0 here"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'random' there"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last is False there, True here"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs is None there, {'num_cycles': 2} here"),
        ({"save_steps": 2}, "save_steps is 3 there, 2 here"),
        ({"tasks": "mnli"}, "task is 'sst2' there, 'mnli' here"),
        ({"freeze_trees": True}, "freeze_trees is False there, True here"),
        ({"class_weights": "balanced"}, "class_weights is 'none' there"),
        ({"max_train_samples": 50}, "max_train_samples is None there, 50 here"),
        ({"do_train": False}, "do_train is True there, False here"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(pretrained, glue_dir, folder, changes, message):
    before = content(folder)
    with pytest.raises(ValueError, match="belongs to a run with other settings") as caught:
        run_all([pretrained], glue_dir, folder, **SAVED | changes)
    assert message in str(caught.value)
    assert content(folder) == before


@pytest.mark.parametrize("changed", ["model", "tokenizer", "config", "train", "validation"])
def test_other_content_under_the_same_name_is_another_run(pretrained, glue_dir, tmp_path, changed):
    model, data = shutil.copytree(pretrained, tmp_path / "model"), shutil.copytree(glue_dir, tmp_path / "glue")
    config = tmp_path / "config"
    AutoConfig.from_pretrained(model).save_pretrained(config)
    changes = {"config_name": str(config), "max_steps": 1}
    run_all([model], data, tmp_path / "out", **changes)
    if changed == "model":
        trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        trained.base_model.save_pretrained(model)
    elif changed == "tokenizer":
        text = (model / "tokenizer.json").read_text()
        (model / "tokenizer.json").write_text(text.replace('"lowercase": true', '"lowercase": false'))
        assert (model / "tokenizer.json").read_text() != text
    elif changed == "config":
        other = AutoConfig.from_pretrained(config)
        other.hidden_dropout_prob = 0.3
        other.save_pretrained(config)
    else:
        write_split(data / "sst2" / f"{changed}.jsonl", [{"sentence": "grass", "label": label} for label in (0, 1)])
    names = {"model": "checkpoint"}
    with pytest.raises(ValueError, match=f"other settings: {names.get(changed, changed)} is "):
        run_all([model], data, tmp_path / "out", **changes)


def test_the_same_run_is_not_repeated_whatever_its_logging_and_paths(
    pretrained, glue_dir, folder, tmp_path, counted, capsys
):
    before = content(folder)
    model, data = shutil.copytree(pretrained, tmp_path / "moved"), shutil.copytree(glue_dir, tmp_path / "elsewhere")
    capsys.readouterr()
    changes = {"logging_steps": 2, "save_total_limit": 1, "dataloader_num_workers": 1, "log_level": "error"}
    (summary,) = run_all([model], data, folder, **SAVED | changes)
    assert not counted and content(folder) == before and summary == json.loads(before["summary.json"])
    assert "[1/1] moved, sst2, seed 42: finished before" in capsys.readouterr().out


def test_overwriting_starts_anew_and_records_what_was_trained(pretrained, glue_dir, folder, counted):
    (folder / "predictions").mkdir()
    (folder / "predictions" / "SST-2.tsv").write_text("of the run before")
    changes = {"learning_rate": 1e-3, "overwrite_output_dir": True}
    (summary,) = run_all([pretrained], glue_dir, folder, **SAVED | changes)
    assert counted == [str(folder)] and summary["resumed_from"] is None
    assert json.loads((folder / "recipe.json").read_text())["learning_rate"] == 1e-3
    assert json.loads((folder / "settings.json").read_text())["learning_rate"] == 1e-3
    assert not list((folder / "predictions").iterdir())


def test_checkpoints_of_unknown_origin_are_not_taken_up(pretrained, glue_dir, folder, tmp_path):
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints and no settings\.json"):
        run_all([pretrained], glue_dir, folder, **SAVED)
    # one that is named is the user's decision
    named = {"resume_from_checkpoint": str(folder / "checkpoint-3")}
    (summary,) = run_all([pretrained], glue_dir, tmp_path / "new", **SAVED | named)
    assert summary["steps"] == 3 and summary["resumed_from"] == named["resume_from_checkpoint"]


def test_a_named_checkpoint_must_be_of_the_same_run(pretrained, glue_dir, folder, tmp_path):
    changes = {"resume_from_checkpoint": str(folder / "checkpoint-3"), "learning_rate": 1e-3}
    with pytest.raises(ValueError, match=r"out' belongs to a run with other settings: learning_rate is 0\.01 there"):
        run_all([pretrained], glue_dir, tmp_path / "new", **SAVED | changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("seeds", [(), (0,)], ids=["alone", "of several"])
def test_work_that_is_asked_for_later_is_done_with_the_trained_model(pretrained, glue_dir, tmp_path, counted, seeds):
    data = shutil.copytree(glue_dir, tmp_path / "glue")
    rows = [{"sentence": f"the {word} {n}", "idx": n} for n, word in enumerate(["stone", "grass"] * 3)]
    write_split(data / "sst2" / "test.jsonl", rows)
    asked = {"max_steps": 20, "learning_rate": 3e-2, "do_eval": False}
    (bare,) = run_all([pretrained], data, tmp_path / "out", "sst2", seeds, **asked)
    run = tmp_path / "out" / ("pretrained/sst2/seed-0" if seeds else ".")
    assert "accuracy" not in bare and not (run / "predictions").exists()

    (measured,) = run_all([pretrained], data, tmp_path / "out", "sst2", seeds, **asked | {"do_eval": True})
    (alone,) = run_all([run], data, tmp_path / "check", do_train=False)
    assert measured.items() >= bare.items() and measured["accuracy"] == alone["accuracy"]
    assert json.loads((run / "summary.json").read_text()) == measured
    assert "| accuracy |" in (run / "README.md").read_text()
    assert not seeds or "SST-2" in (tmp_path / "out" / "glue.md").read_text()

    (predicted,) = run_all([pretrained], data, tmp_path / "out", "sst2", seeds, **asked | {"do_predict": True})
    assert predicted == measured and len(counted) == 1
    answers = (run / "predictions" / "SST-2.tsv").read_text().splitlines()[1:]
    model = AutoModelForSequenceClassification.from_pretrained(run).eval()
    inputs = load_tokenizer(run)([row["sentence"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = model(**inputs).logits.argmax(-1).tolist()
    assert [int(line.split("\t")[1]) for line in answers] == wanted
    if seeds:
        with zipfile.ZipFile(tmp_path / "out" / "pretrained" / "submission-seed-0.zip") as archive:
            assert archive.namelist() == ["SST-2.tsv"]

    everything = asked | {"do_eval": True, "do_predict": True}
    times = {file: file.stat().st_mtime_ns for file in run.rglob("*.tsv")}
    assert run_all([pretrained], data, tmp_path / "out", "sst2", seeds, **everything) == [measured]
    assert times == {file: file.stat().st_mtime_ns for file in run.rglob("*.tsv")} and len(counted) == 1
    write_split(data / "sst2" / "test.jsonl", rows[:2])
    with pytest.raises(ValueError, match=r"test is '6 examples of digest .* there, '2 examples"):
        run_all([pretrained], data, tmp_path / "out", "sst2", seeds, **everything)


def test_work_that_is_asked_for_later_uses_the_merged_adapters(pretrained, glue_dir, tmp_path, counted):
    pytest.importorskip("peft")
    changes = {"lora_rank": 4, "max_steps": 20, **SAVED}
    (whole,) = run_all([pretrained], glue_dir, tmp_path / "whole", **changes)
    run_all([pretrained], glue_dir, tmp_path / "out", do_eval=False, **changes)
    (later,) = run_all([pretrained], glue_dir, tmp_path / "out", **changes)
    assert later["accuracy"] == whole["accuracy"] and len(counted) == 2


def test_the_free_options_exist_and_the_rest_is_recorded(finished):
    known = {"logging_dir"}  # of earlier versions of the Trainer
    for kind in (TrainingArguments, DataTrainingArguments, ModelArguments):
        known |= {field.name for field in dataclasses.fields(kind)}
    assert known >= FREE
    recorded = json.loads((finished / "settings.json").read_text())
    assert recorded.keys() >= known - FREE - {"task_name"}
    assert str(finished) not in (finished / "settings.json").read_text()


def test_another_tokenizer_is_another_run(pretrained, glue_dir, folder, tmp_path):
    save_tokenizer(train_wordpiece(["river sea wind grass stone"] * 9, vocab_size=60), tmp_path / "other")
    with pytest.raises(ValueError, match="other settings: tokenizer is "):
        run_all([pretrained], glue_dir, folder, tokenizer_name=str(tmp_path / "other"), **SAVED)


def test_a_run_that_was_stopped_after_its_last_step_ends_with_its_best_checkpoint(pretrained, glue_dir, tmp_path):
    changes = {"max_steps": 12, "learning_rate": 5e-2, "load_best_model_at_end": True, "save_total_limit": None}
    changes |= {"eval_strategy": "steps", "eval_steps": 3, **SAVED}
    (whole,) = run_all([pretrained], glue_dir, tmp_path / "out", **changes)
    state = json.loads((tmp_path / "out" / "checkpoint-12" / "trainer_state.json").read_text())
    best, weights = state["best_global_step"], (tmp_path / "out" / "model.safetensors").read_bytes()
    assert best < 12, "the last checkpoint is the best: this test compares nothing"
    (tmp_path / "out" / "summary.json").unlink()
    (again,) = run_all([pretrained], glue_dir, tmp_path / "out", **changes)
    assert again["accuracy"] == whole["accuracy"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
