"""A folder holds one run: another is refused, and recipe and card state what was trained."""

import dataclasses
import json
import shutil

import pytest
from transformers import TrainingArguments

from fastbert_hf.training.pretraining.run import pretrain
from fastbert_hf.training.provenance import WITHOUT_EFFECT, Provenance, check_same_settings, training_settings
from tests.training.runs import arguments


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Folder of a finished run of 6 steps with checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    pretrain(*arguments(tiny, folder))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate is 0.01 there, 0.001 here"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is None there, 5.0 here"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs"),
        ({"data_seed": 4}, "data_seed is None there, 4 here"),
        ({"schedule": "trainer"}, "schedule is 'triangle' there, 'trainer' here"),
        ({"disable_dropout": False}, "disable_dropout is True there, False here"),
        ({"batch_ramp": 0.5}, "batch_ramp is 0.0 there, 0.5 here"),
        ({"batch_size": 16}, "batch_size is 8 there, 16 here"),
        ({"train_file": "other"}, "train_file"),
        ({"tokenizer_name": "other"}, "tokenizer"),
        ({"model_config": None, "model_name_or_path": "finished"}, None),
        ({"max_steps": 5}, r"has spent {'max_steps': 6} already; a budget of {'max_steps': 5} leaves nothing"),
        ({"max_steps": -1, "budget_tokens": 128}, r"has spent {'max_steps': 6} already"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_another_run_in_a_finished_folder_is_refused_and_nothing_changes(tiny, finished, tmp_path, changes, message):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    if changes.get("train_file"):
        (tmp_path / "other.txt").write_text((tiny / "corpus.txt").read_text().replace("river", "grass"))
        changes = {"train_file": [str(tmp_path / "other.txt")]}
    if changes.get("tokenizer_name"):
        shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
        content = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
        content["normalizer"]["lowercase"] = False
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
        changes = {"tokenizer_name": str(tmp_path / "tokenizer")}
    if changes.get("model_name_or_path"):
        started = {"model_config": None, "model_name_or_path": str(finished)}
        pretrain(*arguments(tiny, folder, **started, overwrite_output_dir=True, max_steps=3))
        changes = {**started, "model_name_or_path": str(finished / "checkpoint-3"), "max_steps": 3}
        message = "model is '[0-9a-f]{64}' there"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=message):
        pretrain(*arguments(tiny, folder, **changes))
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_what_changes_no_weight_is_allowed(tiny, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(tiny, tmp_path / "elsewhere")
    changes = {
        "logging_steps": 2,
        "save_total_limit": 5,
        "dataloader_num_workers": 1,
        "evaluations": 3,
        "run_name": "x",
    }
    moved = {"tokenizer_name": str(tmp_path / "elsewhere" / "tokenizer")}
    moved["train_file"] = [str(tmp_path / "elsewhere" / "corpus.txt")]
    _, summary = pretrain(*arguments(tiny, tmp_path / "out", **changes, **moved))
    assert summary["steps"] == 6 and summary["resumed_from"].endswith("checkpoint-6")


def test_the_recipe_of_a_run_that_went_on_names_every_budget(tiny, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    assert json.loads((finished / "recipe.json").read_text())["max_steps"] == 6
    for _ in range(2):  # the second time there is nothing left to train
        pretrain(*arguments(tiny, tmp_path / "out", max_steps=-1, budget_tokens=8 * 8 * 16))
        recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
        assert recipe["budget_tokens"] == 1024 and "max_steps" not in recipe
        assert recipe["earlier_part_1"] == "max_steps 6, world_size 1, fp32, until step 6"
        assert "earlier_part_2" not in recipe
        assert "max_steps 6, world_size 1, fp32, until step 6" in (tmp_path / "out" / "README.md").read_text()


def test_the_list_of_what_has_no_effect_names_options_that_exist():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not WITHOUT_EFFECT - names
    weights = {
        "learning_rate",
        "seed",
        "optim",
        "lr_scheduler_kwargs",
        "neftune_noise_alpha",
        "train_sampling_strategy",
    }
    assert weights <= names - WITHOUT_EFFECT


def test_settings_hold_no_token_and_no_path(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), hub_token="hf_secret", use_cpu=True)
    text = json.dumps(training_settings(args))
    assert "hf_secret" not in text and str(tmp_path) not in text


def test_settings_of_another_version_are_compared_where_both_have_them():
    check_same_settings({"a": 1, "gone": 2}, {"a": 1, "new": 3}, "x")
    with pytest.raises(ValueError, match="'x' was made by another run: a is 1 there, 2 here"):
        check_same_settings({"a": 1}, {"a": 2, "new": 3}, "x")


def test_a_damaged_record_is_named(tmp_path):
    Provenance({"a": 1}, [{"from_step": 0}]).write(tmp_path)
    assert Provenance.read(tmp_path) == Provenance({"a": 1}, [{"from_step": 0}])
    (tmp_path / "run_settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"run_settings\.json' cannot be read"):
        Provenance.read(tmp_path)
