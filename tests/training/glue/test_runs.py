"""Many fine-tunings: planned, checked beforehand, resumed, compared in one table."""

import json
import shutil
import zipfile

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.glue import finetuning
from fastbert_hf.training.glue.classifier import ModelArguments
from fastbert_hf.training.glue.finetuning import DataTrainingArguments
from fastbert_hf.training.glue.runs import model_names, task_names
from tests.training.conftest import write_split
from tests.training.runs import run_all


def test_models_are_called_after_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ModelArguments(model_name_or_path=[".", "org/some-model", "a/b/"])
    assert model_names(options) == [tmp_path.name, "some-model", "b"]


def test_task_names_are_expanded():
    assert task_names(["all"])[:2] == ["cola", "sst2"] and len(task_names(["all", "rte"])) == 9
    assert task_names(["RTE", "mrpc", "rte"]) == ["rte", "mrpc"] and task_names([]) == [None]
    assert DataTrainingArguments(task_name="rte,mrpc").task_name == ["rte", "mrpc"]
    with pytest.raises(ValueError, match="unknown GLUE task 'x'"):
        task_names(["rte", "x"])


def test_models_tasks_and_seeds_make_one_table_and_nothing_runs_twice(
    pretrained,
    glue_dir,
    tmp_path,
    counted,
    capsys,
):
    other = tmp_path / "other"
    shutil.copytree(pretrained, other)
    models, tasks = [pretrained, other], ["sst2", "mnli"]
    first = run_all(models, glue_dir, tmp_path / "out", tasks, (0, 1))
    assert len(counted) == len(first) == 8
    assert [(s["model"], s["task"], s["seed"]) for s in first[:3]] == [
        ("pretrained", "sst2", 0),
        ("pretrained", "sst2", 1),
        ("pretrained", "mnli", 0),
    ]
    folder = tmp_path / "out" / "other" / "mnli" / "seed-1"
    for name in ("summary.json", "README.md", "learning-curve.png", "confusion-validation-matched.png"):
        assert (folder / name).stat().st_size
    assert "model-index" in (folder / "README.md").read_text()
    table = (tmp_path / "out" / "glue.md").read_text()
    assert table in capsys.readouterr().out and "| other" in table and "MNLI-mm" in table

    (folder / "summary.json").unlink()  # as if it had been interrupted
    again = run_all(models, glue_dir, tmp_path / "out", tasks, (0, 1))
    assert counted[8:] == [str(folder)]
    times = ("train_seconds", "eval_seconds_validation_matched", "eval_seconds_validation_mismatched")
    for before, after in zip(first, again, strict=True):
        assert {k: v for k, v in before.items() if k not in times} == {
            k: v for k, v in after.items() if k not in times
        }

    with pytest.raises(ValueError, match=r"other settings: learning_rate is 0\.01 there, 0\.1 here"):
        run_all(models, glue_dir, tmp_path / "out", tasks, (0, 1), learning_rate=0.1)
    with pytest.raises(ValueError, match="other settings: max_train_samples is None there, 5 here"):
        run_all(models, glue_dir, tmp_path / "out", tasks, (0, 1), max_train_samples=5, max_steps=3)
    assert len(counted) == 9 and (folder / "summary.json").is_file()


def test_an_interrupted_run_goes_on_from_its_checkpoint(pretrained, glue_dir, tmp_path, monkeypatch):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = run_all([pretrained], glue_dir, tmp_path / "whole", "sst2", (0, 1), **changes)
    original = finetuning.plot_learning_curve

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "plot_learning_curve", killed)
    with pytest.raises(KeyboardInterrupt):
        run_all([pretrained], glue_dir, tmp_path / "cut", "sst2", (0, 1), **changes)
    monkeypatch.setattr(finetuning, "plot_learning_curve", original)
    run = tmp_path / "cut" / "pretrained" / "sst2" / "seed-0"
    shutil.rmtree(run / "checkpoint-6")
    summaries = run_all([pretrained], glue_dir, tmp_path / "cut", "sst2", (0, 1), **changes)
    assert summaries[0]["resumed_from"] == str(run / "checkpoint-4")
    assert [s["accuracy"] for s in summaries] == [s["accuracy"] for s in whole]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume_from_checkpoint": "a/checkpoint-1"}, "'a/checkpoint-1' is a checkpoint of one run; 2 are wanted"),
        ({"tasks": "all"}, "cola has no train split"),
        ({"tasks": ["sst2", "mrpc"]}, "mrpc has no train split"),
        ({"tasks": ["sst2", "stsb"], "class_weights": "balanced"}, "stsb has no classes"),
        ({"model_names": ["a", "b"]}, "one for each of 1 models; got a, b"),
        ({"model_names": ["a/b"]}, "'a/b' cannot"),
        ({"max_seq_length": 64}, "max_position_embeddings 32"),
        ({"early_stopping_patience": -1}, "early_stopping_patience must be 0 or above"),
        ({"push_to_hub": True}, "several runs needs --hub_model_id"),
    ],
)
def test_mistakes_are_named_before_the_first_run(pretrained, glue_dir, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_all([pretrained], glue_dir, tmp_path / "out", **{"seeds": (0, 1), **changes})
    assert not (tmp_path / "out").exists()


def test_every_model_is_checked_before_the_first_run(pretrained, glue_dir, tmp_path):
    AutoModelForMaskedLM.from_pretrained(pretrained).save_pretrained(tmp_path / "bare")
    for second, message in (
        (tmp_path / "bare", "no tokenizer in"),
        (tmp_path, r"config\.json is missing"),
        (pretrained, "two models have the same name"),
    ):
        with pytest.raises(ValueError, match=message):
            run_all([pretrained, second], glue_dir, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_test_splits_are_predicted_and_zipped(pretrained, glue_dir, tmp_path, capsys):
    folder = tmp_path / "glue"
    shutil.copytree(glue_dir, folder)
    rows = [{"sentence": f"the stone {number}", "label": -1, "idx": number} for number in range(5)]
    write_split(folder / "sst2" / "test.jsonl", rows)
    run_all([pretrained], folder, tmp_path / "out", "sst2", (3,), do_predict=True)
    archive = tmp_path / "out" / "pretrained" / "submission-seed-3.zip"
    with zipfile.ZipFile(archive) as content:
        lines = content.read("SST-2.tsv").decode().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == list("01234")
    assert f"{archive}: the server also wants CoLA.tsv, MNLI-m.tsv" in capsys.readouterr().out


def test_evaluation_alone_needs_no_training_split(pretrained, glue_dir, tmp_path):
    run_all([pretrained], glue_dir, tmp_path / "trained", "sst2")
    folder = tmp_path / "glue"
    shutil.copytree(glue_dir, folder)
    (folder / "sst2" / "train.jsonl").unlink()
    (summary,) = run_all([tmp_path / "trained"], folder, tmp_path / "out", "sst2", do_train=False)
    stored = json.loads((tmp_path / "trained" / "summary.json").read_text())
    assert summary["accuracy"] == stored["accuracy"] and summary["train_examples"] == 0
    assert not (tmp_path / "out" / "model.safetensors").exists()


def parameters(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_frozen_trees_stay_and_the_rest_learns(pretrained, glue_dir, tmp_path):
    run_all([pretrained], glue_dir, tmp_path / "out", freeze_trees=True)
    before, after = parameters(pretrained), parameters(tmp_path / "out")
    changed = {name for name in before if "classifier" not in name and not torch.equal(before[name], after[name])}
    assert any("attention" in name for name in changed) and not any(".ffn." in name for name in changed)


def test_fine_tuning_updates_the_visited_rows_of_the_trees_and_no_others(pretrained, glue_dir, tmp_path):
    deep = AutoConfig.from_pretrained(pretrained)
    deep.fff_depth = 7
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(deep).save_pretrained(tmp_path / "deep")
    load_tokenizer(pretrained).save_pretrained(tmp_path / "deep")
    run_all([tmp_path / "deep"], glue_dir, tmp_path / "out", max_steps=1, optim="sgd", learning_rate=0.5)
    before, after = parameters(tmp_path / "deep"), parameters(tmp_path / "out")
    for name in (name for name in before if ".ffn.weight" in name):
        changed = (before[name] != after[name]).any(dim=1)
        assert changed[0] and 8 <= int(changed.sum()) < len(changed) == 255


@pytest.mark.parametrize("lora_trees", [False, True])
def test_lora_trains_adapters_and_saves_a_whole_model(pretrained, glue_dir, tmp_path, lora_trees):
    pytest.importorskip("peft")
    (summary,) = run_all([pretrained], glue_dir, tmp_path / "out", lora_rank=4, lora_trees=lora_trees, max_steps=20)
    before, after = parameters(pretrained), parameters(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if "classifier" not in name and not torch.equal(before[name], after[name])}
    assert all(".attention." in name or (lora_trees and ".ffn.weight" in name) for name in changed)
    assert any(".attention." in name for name in changed) and any(".ffn." in name for name in changed) == lora_trees
    (again,) = run_all([tmp_path / "out"], glue_dir, tmp_path / "again", do_train=False)
    assert again["accuracy"] == summary["accuracy"]


def test_lora_goes_on_from_its_checkpoints(pretrained, glue_dir, tmp_path):
    pytest.importorskip("peft")
    changes = {"lora_rank": 4, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    (whole,) = run_all([pretrained], glue_dir, tmp_path / "out", **changes)
    for last in (6, 3):
        (tmp_path / "out" / "summary.json").unlink()  # as if it had been interrupted
        (again,) = run_all([pretrained], glue_dir, tmp_path / "out", **changes)
        assert again["resumed_from"] == str(tmp_path / "out" / f"checkpoint-{last}")
        assert again["accuracy"] == whole["accuracy"] and again["steps"] == 6
        shutil.rmtree(tmp_path / "out" / "checkpoint-6")


def test_trees_and_attention_must_be_there_to_be_named(pretrained, glue_dir, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = load_tokenizer(pretrained)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"--freeze_trees: .*\(bert\) has no trees"):
        run_all([tmp_path / "bert"], glue_dir, tmp_path / "out", freeze_trees=True)
    (summary,) = run_all([tmp_path / "bert"], glue_dir, tmp_path / "lora", lora_rank=2)
    assert 0 <= summary["accuracy"] <= 1 and (tmp_path / "lora" / "README.md").is_file()


def test_early_stopping_keeps_the_best_epoch(pretrained, glue_dir, tmp_path):
    changes = {"max_steps": -1, "num_train_epochs": 30, "early_stopping_patience": 2, "learning_rate": 2e-2}
    (summary,) = run_all(
        [pretrained], glue_dir, tmp_path / "out", train_sampling_strategy="group_by_length", **changes
    )
    states = sorted((tmp_path / "out").glob("checkpoint-*/trainer_state.json"), key=lambda f: f.stat().st_mtime)
    history = [e["eval_accuracy"] for e in json.loads(states[-1].read_text())["log_history"] if "eval_accuracy" in e]
    assert len(history) < 30 and summary["accuracy"] == max(history)


def test_balanced_classes_weigh_the_same(pretrained, glue_dir, tmp_path):
    """Nine of ten examples have one label and all texts are alike: the model must not lean to either."""
    folder = tmp_path / "glue"
    for split, count in (("train", 200), ("validation", 20)):
        rows = [{"sentence": "the stone", "label": int(number % 10 == 0)} for number in range(count)]
        write_split(folder / "sst2" / f"{split}.jsonl", rows)
    shares = {}
    for weights in ("none", "balanced"):
        changes = {"class_weights": weights, "max_steps": 60, "per_device_train_batch_size": 50}
        run_all([pretrained], folder, tmp_path / weights, **changes)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / weights).eval()
        inputs = load_tokenizer(pretrained)(["the stone"], return_tensors="pt")
        shares[weights] = model(**inputs).logits.softmax(-1)[0, 1].item()
    assert shares["none"] < 0.25 and abs(shares["balanced"] - 0.5) < 0.15
