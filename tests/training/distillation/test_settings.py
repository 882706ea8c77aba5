"""What a run may be made with, and what it goes on with or removes."""

import json
import re
import shutil
import weakref

import pytest

from fastbert_hf.benchmarks import distilled
from fastbert_hf.training.distillation.objective import WEIGHTS
from fastbert_hf.training.distillation.teacher import load_teacher
from tests.training.distillation.runs import distill


@pytest.mark.parametrize(("changes", "message"), [
    ({"held_out_texts": 0}, "held_out_texts must be at least 1; got 0"),
    ({"fit_learning_rate": -1}, "fit_learning_rate must be positive; got -1"),
    ({"speed": -2}, "speed must be positive; got -2"),
    ({"speed": "nan"}, "speed must be positive; got nan"),
    ({"per_device_train_batch_size": 4}, "train_batch_size is 4; a distillation does not use it: batch_size"),
    ({"num_train_epochs": 2}, "num_train_epochs is 2.0; a distillation does not use it: budget_minutes or max_steps"),
    ({"warmup_steps": 10}, "warmup_steps is 10"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps"}, "load_best_model_at_end is True"),
    ({"push_to_hub": True}, "push_to_hub is True"),
])  # fmt: skip
def test_options_without_effect_or_sense_are_named(tiny, bert, changes, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        distill(bert, tiny / "corpus.txt", tmp_path / "out", **changes)


def test_a_run_for_a_speed_goes_on_with_the_leaves_that_it_found(tiny, bert, tmp_path, monkeypatch):
    milliseconds = 20.0

    def speed(models, case, rounds):
        return {"teacher": 100.0, "student": milliseconds + models["student"].config.fff_leaf_width / 4}

    monkeypatch.setattr(distilled, "speed", speed)
    options = {"speed": 2, "fff_leaf_width": None, "max_steps": 1}
    text = tiny / "corpus.txt"
    assert distill(bert, text, tmp_path, **options)["form"] == "leaf:1x2x96"
    milliseconds = 40.0  # the machine is slower now
    assert distill(bert, text, tmp_path, **options)["form"] == "leaf:1x2x96"
    with pytest.raises(ValueError, match="form is 'leaf:1x2x96' there, 'leaf:1x2x48' here"):
        distill(bert, text, tmp_path, **options | {"speed": 1.9})
    assert distill(bert, text, tmp_path, **options, overwrite_output_dir=True)["form"] == "leaf:1x2x32"


def test_students_to_measure_are_built_one_at_a_time_and_no_wider_than_needed(bert, monkeypatch):
    built, student_of = [], distilled.student_of

    def build(teacher, form):
        assert all(model() is None for _, model in built), "the last one is still in memory"
        student = student_of(teacher, form)
        built.append((student.encoder.config.fff_leaf_width, weakref.ref(student.encoder)))
        return student

    def speed(models, case, rounds):
        return {"teacher": 100.0, "student": 20.0 + models["student"].config.fff_leaf_width / 4}

    monkeypatch.setattr(distilled, "student_of", build)
    monkeypatch.setattr(distilled, "speed", speed)
    assert distilled.form_for_speed(load_teacher(str(bert)), 3.0, 2, 1) == "leaf:1x2x48"
    assert [width for width, _ in built] == [1, 2, 4, 8, 16, 32, 48, 64]


def test_a_mistake_removes_nothing(tiny, bert, tmp_path):
    distill(bert, tiny / "corpus.txt", tmp_path / "run", max_steps=1)
    before = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    for mistake in ({"model_name_or_path": "absent"}, {"eval_file": "absent.csv"}, {"batch_size": 10**6}):
        with pytest.raises(ValueError, match=r"absent|different texts"):
            distill(bert, tiny / "corpus.txt", tmp_path / "run", **mistake, overwrite_output_dir=True)
    assert sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file()) == before


def test_a_run_does_not_go_on_with_another_loss(tiny, bert, tmp_path, monkeypatch):
    distill(bert, tiny / "corpus.txt", tmp_path / "run", max_steps=1)
    monkeypatch.setitem(WEIGHTS, "hidden_error", 2.0)
    with pytest.raises(ValueError, match="made by another run: loss_weights is"):
        distill(bert, tiny / "corpus.txt", tmp_path / "run", max_steps=2)


def test_a_run_that_is_older_than_a_setting_does_not_go_on_with_another(tiny, bert, tmp_path):
    run = tmp_path / "run"
    distill(bert, tiny / "corpus.txt", run, max_steps=1)
    files = [run / "run_settings.json", *run.glob("checkpoint-*/run_settings.json")]
    found = json.loads(files[0].read_text())
    for name in ("train_routers", "loss_weights"):
        older = {key: value for key, value in found["settings"].items() if key != name}
        for file in files:
            file.write_text(json.dumps(found | {"settings": older}))
        with pytest.raises(ValueError, match=f"made by another run: {name} is"):
            distill(bert, tiny / "corpus.txt", run, max_steps=2)


def test_a_new_run_in_place_of_another_takes_nothing_over(tiny, bert, embedder, tmp_path):
    run, text = tmp_path / "run", tiny / "corpus.txt"
    distill(embedder, text, run, max_steps=1)
    (run / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    bare = shutil.copytree(bert, tmp_path / "bare", ignore=shutil.ignore_patterns("README.md"))
    distill(bare, text, run, max_steps=1, overwrite_output_dir=True)
    assert not (run / "modules.json").exists()
    assert "license:" not in (run / "README.md").read_text()


def test_a_checkpoint_of_another_training_is_left_alone(tiny, bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "checkpoint-1")
    (folder / "run_settings.json").write_text(json.dumps({"settings": {"seed": 42}, "parts": []}))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds a model that is not of a distillation"):
            distill(bert, tiny / "corpus.txt", folder, overwrite_output_dir=overwrite)
    assert (folder / "config.json").is_file()
