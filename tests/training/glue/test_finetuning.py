"""Fine-tuning on tiny tasks: it learns, reports honestly, resumes, and refuses bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, TrainingArguments

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.data.glue import TASKS
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.glue.classifier import ModelArguments
from fastbert_hf.training.glue.finetuning import DataTrainingArguments, finetune
from tests.training.conftest import write_split


def run(pretrained, output_dir, data, **changes):
    model = {"model_name_or_path": str(pretrained)}
    for name in list(changes):
        if name in ModelArguments.__dataclass_fields__:
            model[name] = changes.pop(name)
    training = {
        "output_dir": str(output_dir),
        "do_train": True,
        "do_eval": True,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    data = {
        "max_seq_length": 24,
        **{name: str(value) if isinstance(value, Path) else value for name, value in data.items()},
    }
    return finetune(ModelArguments(**model), DataTrainingArguments(**data), TrainingArguments(**training))


def test_classification_learns_and_names_its_labels(pretrained, glue_dir, tmp_path):
    model, summary = run(pretrained, tmp_path / "out", {"task_name": "sst2", "glue_dir": glue_dir})
    assert summary["accuracy"] > 0.9 > summary["majority_accuracy"]
    assert summary["train_examples"] == 120 and summary["examples"] == 40
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == {0: "negative", 1: "positive"}
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_evaluation_alone_repeats_the_numbers_of_training(pretrained, glue_dir, tmp_path):
    data = {"task_name": "sst2", "glue_dir": glue_dir}
    _, trained = run(pretrained, tmp_path / "trained", data, num_train_epochs=1)
    for number, padding in enumerate(("", "1")):
        padded = {**data, "pad_to_max_length": padding}
        _, again = run(tmp_path / "trained", tmp_path / f"again{number}", padded, do_train=False)
        assert again["accuracy"] == trained["accuracy"]
        assert "train_loss" not in again


def test_regression_learns_and_reports_correlations(pretrained, glue_dir, tmp_path):
    _, summary = run(pretrained, tmp_path, {"task_name": "stsb", "glue_dir": glue_dir}, num_train_epochs=8)
    assert summary["pearson"] > 0.8 and summary["spearman"] > 0.8
    assert summary["majority_pearson"] == 0.0
    assert AutoConfig.from_pretrained(tmp_path).problem_type == "regression"


def test_mnli_is_measured_on_both_validation_sets(pretrained, glue_dir, tmp_path):
    _, summary = run(pretrained, tmp_path, {"task_name": "mnli", "glue_dir": glue_dir}, max_steps=2)
    for name in ("validation_matched", "validation_mismatched"):
        assert 0 <= summary[f"accuracy_{name}"] <= 1
        assert summary[f"majority_accuracy_{name}"] == pytest.approx(1 / 3)


def test_own_files_with_named_labels(pretrained, glue_dir, tmp_path):
    rows = [{"text": "grass and stone", "label": "plants"}, {"text": "stone", "label": "minerals"}] * 4
    write_split(tmp_path / "train.jsonl", rows)
    files = {"train_file": tmp_path / "train.jsonl", "validation_file": tmp_path / "train.jsonl"}
    model, summary = run(pretrained, tmp_path / "out", files, max_steps=1)
    assert summary["task"] == "custom" and summary["majority_accuracy"] == 0.5 and summary["model"] == str(pretrained)
    assert model.config.label2id == {"minerals": 0, "plants": 1}
    settings = tmp_path / "out" / "settings.json"
    settings.write_text(settings.read_text().replace('"task": "custom"', '"task": "own"'))  # of an earlier version
    assert run(pretrained, tmp_path / "out", files, max_steps=1)[1] == summary


def test_a_finished_run_is_picked_up_not_repeated(pretrained, glue_dir, tmp_path, counted):
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6}
    data = {"task_name": "sst2", "glue_dir": glue_dir}
    _, first = run(pretrained, tmp_path, data, **changes)
    trained = (tmp_path / "model.safetensors").stat().st_mtime_ns
    model, same = run(pretrained, tmp_path, data, **changes)
    assert same == first and len(counted) == 1
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == trained
    for name, value in AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    (tmp_path / "summary.json").unlink()  # as if it had been interrupted
    _, again = run(pretrained, tmp_path, data, **changes)
    assert again["resumed_from"] == str(tmp_path / "checkpoint-6")
    assert again["accuracy"] == first["accuracy"] and again["steps"] == 6
    with pytest.raises(ValueError, match="made by another run: id2label"):
        run(pretrained, tmp_path, {"task_name": "mnli", "glue_dir": glue_dir}, **changes)


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ({"task_name": "glue"}, {}, "unknown GLUE task 'glue'"),
        ({"task_name": None}, {}, "no data"),
        ({"task_name": "rte"}, {}, "rte has no train split"),
        ({"glue_dir": "absent"}, {}, "'absent' is not a folder"),
        ({"train_file": "a.csv"}, {}, "got both"),
        ({"max_seq_length": 64}, {}, "max_position_embeddings 32"),
        ({"max_seq_length": 7}, {}, "max_seq_length must be at least 8; got 7"),
        ({"max_seq_length": -1}, {}, "max_seq_length must be at least 8; got -1"),
        ({}, {"per_device_eval_batch_size": -2}, "per_device_eval_batch_size must be at least 1; got -2"),
        ({}, {"learning_rate": -1e-3}, r"learning_rate must be a finite number.*got -0\.001"),
        ({}, {"model_name_or_path": None}, "--model_name_or_path is missing"),
        ({}, {"do_train": False, "do_eval": False}, "nothing to do"),
        ({}, {"do_predict": True}, "sst2 has no test split"),
        ({"class_weights": "balanced", "task_name": "stsb"}, {}, "class_weights: stsb has no classes"),
        ({}, {"lora_rank": -1}, "--lora_rank must be 0 or above; got -1"),
        ({}, {"lora_trees": True}, "--lora_trees needs --lora_rank"),
        ({}, {"lora_trees": True, "lora_rank": 2, "freeze_trees": True}, "choose one"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(pretrained, glue_dir, tmp_path, data, changes, message):
    with pytest.raises(ValueError, match=message):
        run(pretrained, tmp_path / "out", {"task_name": "sst2", "glue_dir": glue_dir, **data}, **changes)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output_folder_is_refused_before_the_data_is_read(pretrained):
    with pytest.raises(ValueError, match="'/proc/x' cannot be written"):
        run(pretrained, "/proc/x", {"task_name": "glue"})


def test_folders_without_model_or_tokenizer_are_named(pretrained, glue_dir, tiny, tmp_path):
    data = {"task_name": "sst2", "glue_dir": glue_dir}
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        run(tiny / "tokenizer", tmp_path / "out", data)
    AutoModelForMaskedLM.from_pretrained(pretrained).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no tokenizer in"):
        run(tmp_path / "bare", tmp_path / "out", data)
    write_split(tmp_path / "one.jsonl", [{"sentence": "a", "label": 0}])
    with pytest.raises(ValueError, match="--validation_file is missing"):
        run(pretrained, tmp_path / "out", {"train_file": tmp_path / "one.jsonl"})
    assert not (tmp_path / "out").exists()


def test_truncated_weights_are_named(pretrained, glue_dir, tmp_path):
    shutil.copytree(pretrained, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut' cannot be read: model\.safetensors"):
        run(tmp_path / "cut", tmp_path / "out", {"task_name": "sst2", "glue_dir": glue_dir})
    assert not (tmp_path / "out").exists()


def test_a_head_with_other_labels_is_refused_or_replaced(pretrained, glue_dir, tmp_path):
    run(pretrained, tmp_path / "sst2", {"task_name": "sst2", "glue_dir": glue_dir}, max_steps=1)
    data = {"task_name": "mnli", "glue_dir": glue_dir}
    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        run(tmp_path / "sst2", tmp_path / "out", data, max_steps=1)
    assert not (tmp_path / "out").exists()
    _, summary = run(tmp_path / "sst2", tmp_path / "out", data, max_steps=1, ignore_mismatched_sizes=True)
    assert summary["steps"] == 1


@pytest.fixture(scope="module")
def sentiment(pretrained, glue_dir, tmp_path_factory):
    """A classifier that solves the first task, and its summary."""
    folder = tmp_path_factory.mktemp("sentiment") / "out"
    _, summary = run(pretrained, folder, {"task_name": "sst2", "glue_dir": glue_dir})
    return folder, summary


def stored_labels(source, folder, *names):
    """A copy of a checkpoint whose head calls its outputs by other names, in the order of the names."""
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    if names[0].lower() == "positive":
        with torch.no_grad():
            for value in model.classifier.parameters():
                value.copy_(value.flip(0))
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("names", [("positive", "negative"), ("POSITIVE", "NEGATIVE"), ("LABEL_0", "LABEL_1")])
def test_a_trained_head_keeps_its_order_of_labels(sentiment, glue_dir, tmp_path, names):
    source, trained = sentiment
    folder = stored_labels(source, tmp_path / "other", *names)
    data = {"task_name": "sst2", "glue_dir": glue_dir}
    model, summary = run(folder, tmp_path / "out", data, do_train=False)
    assert summary["accuracy"] == trained["accuracy"] > 0.9
    assert summary["majority_accuracy"] == trained["majority_accuracy"]
    kept = ("negative", "positive") if names[0] == "LABEL_0" else names
    assert tuple(model.config.id2label.values()) == kept
    _, further = run(folder, tmp_path / "further", data, max_steps=3, learning_rate=1e-4)
    assert further["accuracy"] >= trained["accuracy"] - 0.05 and further["train_loss"] < 0.3


def test_a_head_with_other_names_is_refused_or_made_anew(sentiment, glue_dir, tmp_path):
    source, _ = sentiment
    folder = stored_labels(source, tmp_path / "other", "spam", "ham")
    data = {"task_name": "sst2", "glue_dir": glue_dir}
    with pytest.raises(ValueError, match=r"2 outputs \(spam, ham\) and sst2 wants 2 \(negative, positive\)"):
        run(folder, tmp_path / "out", data, do_train=False)
    assert not (tmp_path / "out").exists()
    model, _ = run(folder, tmp_path / "out", data, do_train=False, ignore_mismatched_sizes=True)
    before = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("classifier") for name in changed)


def test_the_table_covers_every_metric():
    assert {name for task in TASKS.values() for name in task.metrics} == {
        "accuracy",
        "f1",
        "matthews_correlation",
        "pearson",
        "spearman",
    }
