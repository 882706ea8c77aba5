"""Options that do not combine are refused before anything is read or written, or both are obeyed."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from fastbert_hf.data.glue import Split, Task, TaskData
from fastbert_hf.training.glue import options as glue_options
from fastbert_hf.training.glue import runs as glue_runs
from fastbert_hf.training.glue.classifier import Head
from fastbert_hf.training.glue.finetuning import DataTrainingArguments, _balanced_loss
from tests.training.conftest import write_split
from tests.training.runs import run_all

STEPS = {"eval_strategy": "steps", "eval_steps": 2}
BEST = {**STEPS, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "all", "label_smoothing_factor": 0.1}, "label_smoothing_factor: stsb has no classes"),
        ({"tasks": ["sst2", "STSB"], "class_weights": "balanced"}, "class_weights: stsb has no classes"),
        ({"label_smoothing_factor": 1.5}, "label_smoothing_factor must be 0 or above and below 1; got 1.5"),
        ({"tasks": "all", "metric_for_best_model": "accuracy", **BEST}, "one of matthews_correlation, loss for cola"),
        ({"metric_for_best_model": "acc", "early_stopping_patience": 1}, "one of accuracy, loss for sst2; got 'acc'"),
        ({"do_train": False, "class_weights": "balanced"}, "class_weights needs --do_train"),
        ({"do_train": False, "early_stopping_patience": 1}, "early_stopping_patience needs --do_train"),
        ({"do_train": False, "push_to_hub": True}, "push_to_hub needs --do_train"),
        ({"do_train": False, "freeze_trees": True}, "--freeze_trees needs --do_train"),
        ({"do_train": False, "lora_rank": 2}, "--lora_rank needs --do_train"),
        ({"lora_alpha": 4}, "--lora_alpha needs --lora_rank"),
        ({"lora_alpha": 0, "lora_rank": 2}, "--lora_alpha must be 1 or above; got 0"),
        ({"prediction_loss_only": True}, "prediction_loss_only must be False where answers are measured"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches must be True"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics must be False"),
    ],
)
def test_options_that_do_not_combine_are_refused_before_data_is_read(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(glue_runs, "load_task", lambda *_: pytest.fail("data was read before the check"))
    with pytest.raises(ValueError, match=message):
        run_all([tmp_path / "absent"], tmp_path, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_early_stopping_on_own_data_needs_a_validation_file(tmp_path):
    write_split(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    changes = {"train_file": str(tmp_path / "a.jsonl"), "do_eval": False, "early_stopping_patience": 1}
    with pytest.raises(ValueError, match="early_stopping_patience needs --validation_file"):
        run_all([tmp_path / "absent"], None, tmp_path / "out", **changes)


def test_own_data_of_numbers_refuses_options_of_classes_before_training(pretrained, tmp_path, counted):
    rows = [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}]
    write_split(tmp_path / "a.jsonl", rows)
    files = dict.fromkeys(("train_file", "validation_file"), str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="label_smoothing_factor: custom has no classes"):
        run_all([pretrained], None, tmp_path / "out", label_smoothing_factor=0.1, **files)
    assert not counted and not (tmp_path / "out").exists()


def test_balanced_classes_and_label_smoothing_are_both_obeyed(pretrained, glue_dir, tmp_path):
    losses = {
        smoothing: run_all(
            [pretrained],
            glue_dir,
            tmp_path / str(smoothing),
            class_weights="balanced",
            label_smoothing_factor=smoothing,
        )[0]["train_loss"]
        for smoothing in (0.0, 0.5)
    }
    assert losses[0.5] != losses[0.0]


def test_the_balanced_and_smoothed_loss_by_hand():
    task = Task("custom", ("text",), ("a", "b"))
    data = TaskData(task, Split("x", [["t"] * 4], [0, 0, 0, 1]), {})
    loss = _balanced_loss(data, Head(None, [1, 0], False), label_smoothing=0.2)  # the head has b first
    logits = torch.tensor([[0.3, -0.4]])
    weight_b, weight_a = 4 / (2 * 1), 4 / (2 * 3)
    log_b, log_a = torch.log_softmax(logits[0].double(), 0).tolist()
    wanted = -0.8 * weight_a * log_a - 0.1 * (weight_a * log_a + weight_b * log_b)
    assert math.isclose(loss({"logits": logits}, torch.tensor([1])).item(), wanted, rel_tol=1e-5)


def test_early_stopping_with_evaluation_by_steps_keeps_the_best(pretrained, glue_dir, tmp_path):
    """The default of --save_strategy, or one that saves elsewhere, would leave the best weights unsaved."""
    changes = {"max_steps": 12, "early_stopping_patience": 4, "learning_rate": 5e-2, **STEPS, "save_strategy": "no"}
    (summary,) = run_all([pretrained], glue_dir, tmp_path / "out", **changes)
    states = sorted((tmp_path / "out").glob("checkpoint-*/trainer_state.json"), key=lambda f: f.stat().st_mtime)
    history = [e["eval_accuracy"] for e in json.loads(states[-1].read_text())["log_history"] if "eval_accuracy" in e]
    assert len(history) > 1 and summary["accuracy"] == max(history)


def test_dropping_the_last_training_batch_leaves_evaluation_and_predictions_whole(pretrained, glue_dir, tmp_path):
    folder = tmp_path / "glue"
    shutil.copytree(glue_dir, folder)
    write_split(folder / "sst2" / "test.jsonl", [{"sentence": "the stone"}] * 7)
    changes = {"do_predict": True, "per_device_eval_batch_size": 16, **BEST}
    kept, dropped = (
        run_all([pretrained], folder, tmp_path / str(drop), dataloader_drop_last=drop, **changes)[0]
        for drop in (False, True)
    )
    assert kept["accuracy"] == dropped["accuracy"] and dropped["examples"] == 40
    assert len((tmp_path / "True" / "predictions" / "SST-2.tsv").read_text().splitlines()) == 8


def test_every_option_of_own_classes_is_checked_for_every_task_of_all():
    args = TrainingArguments(output_dir="x", do_train=True, label_smoothing_factor=np.float64(0.1), use_cpu=True)
    with pytest.raises(ValueError, match="stsb has no classes"):
        DataTrainingArguments(task_name=["all"]).check(args)
    DataTrainingArguments(task_name=["cola,mnli"]).check(args)
    assert glue_options.MEASURABLE.keys() <= args.to_dict().keys()
