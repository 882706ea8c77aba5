"""Pretraining under a budget: rate, ramp, resuming, steps that are not finite, checkpoints that cannot be written."""

import json
import math
import resource
import shutil

import pytest
import torch
from transformers import AutoModelForMaskedLM

from fastbert_hf.training import budget_trainer
from fastbert_hf.training.budget import triangle
from fastbert_hf.training.pretraining.run import pretrain
from fastbert_hf.training.tree_usage import counted_visits, tree_layers, tree_usage
from tests.training.runs import arguments, losses

TOKENS_A_STEP = 8 * 16


def budget(steps, **changes):
    """A budget of so many full steps in tokens."""
    return {"max_steps": -1, "budget_tokens": steps * TOKENS_A_STEP, "logging_steps": 1, **changes}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Folder and summary of a run of 12 steps with checkpoints at 4, 8 and 12 and a growing batch."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    changes = budget(12, save_steps=4, batch_size=8, per_device_train_batch_size=4, batch_ramp=0.6, evaluations=2)
    _, summary = pretrain(*arguments(tiny, folder, **changes))
    return folder, summary, changes


def test_the_rate_follows_the_clock_and_the_batch_grows(finished):
    folder, summary, _ = finished
    history = json.loads((folder / "history.json").read_text())
    steps = [entry for entry in history if "loss" in entry]
    fed = [entry["tokens"] for entry in steps]
    sizes = [after - before for before, after in zip([0, *fed], fed)]
    assert sizes[0] == TOKENS_A_STEP // 2 and sizes[-1] == TOKENS_A_STEP and sizes == sorted(sizes)
    for before, entry in zip([0, *fed], steps):
        assert entry["learning_rate"] == pytest.approx(1e-2 * triangle(before / (12 * TOKENS_A_STEP)), rel=1e-6)
    assert summary["tokens_seen"] == fed[-1] >= 12 * TOKENS_A_STEP and summary["steps"] == len(steps) > 12
    evaluated = [entry["budget_fraction"] for entry in history if "eval_loss" in entry]
    assert len(evaluated) == 2 and 0.5 <= evaluated[0] < 0.6 and evaluated[1] == 1.0


def test_a_resumed_run_repeats_the_losses_bit_for_bit(tiny, finished, tmp_path):
    folder, summary, changes = finished
    for stop in (4, 8):
        out = tmp_path / str(stop)
        shutil.copytree(folder / f"checkpoint-{stop}", out / f"checkpoint-{stop}")
        _, again = pretrain(*arguments(tiny, out, **changes))
        assert losses(out) == losses(folder)
        assert again["validation_loss"] == summary["validation_loss"]
        assert again["tokens_seen"] == summary["tokens_seen"] and again["resumed_from"].endswith(f"-{stop}")
        assert again["resume_seconds"] > 0 and summary["resume_seconds"] is None


@pytest.fixture(scope="module")
def dropped(tiny, tmp_path_factory):
    """Folder and changes of a run of 8 steps with dropout and checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("dropped") / "out"
    parts = {"batch_size": 8, "per_device_train_batch_size": 4, "disable_dropout": False}
    changes = budget(8, save_steps=3, **parts)
    pretrain(*arguments(tiny, folder, **changes))
    return folder, changes


@pytest.mark.parametrize(
    "others",
    [{}, {"dataloader_num_workers": 2}, {"eval_on_start": True}, {"evaluations": 4}],
    ids=["alone", "loader processes", "evaluation at the start", "evaluations between"],
)
def test_dropout_after_a_resume_is_that_of_an_undisturbed_run(tiny, dropped, tmp_path, others):
    """Whatever draws random numbers beside the model."""
    folder, changes = dropped
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    _, summary = pretrain(*arguments(tiny, tmp_path, **changes, **others))
    assert summary["resumed_from"].endswith("checkpoint-3")
    assert losses(tmp_path) == losses(folder)


def test_every_microbatch_has_a_dropout_of_its_own(tiny, tmp_path, monkeypatch):
    draws = []
    original = budget_trainer.BudgetTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            draws.append(torch.rand(4).tolist())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(budget_trainer.BudgetTrainer, "compute_loss", compute_loss)
    parts = {"batch_size": 8, "per_device_train_batch_size": 4, "save_strategy": "no"}
    for seed in (0, 1):
        pretrain(*arguments(tiny, tmp_path / str(seed), **budget(3, seed=seed, **parts)))
    assert len(draws) == 12 and len(set(map(tuple, draws))) == 12


def test_a_finished_run_is_reported_again_without_training(tiny, finished, tmp_path):
    folder, summary, changes = finished
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.copytree(last, tmp_path / last.name)
    _, again = pretrain(*arguments(tiny, tmp_path, **changes))
    assert again["validation_loss"] == summary["validation_loss"] and again["steps"] == summary["steps"]


def test_loader_processes_change_no_loss(tiny, finished, tmp_path):
    folder, summary, changes = finished
    shutil.copytree(folder / "checkpoint-8", tmp_path / "checkpoint-8")
    _, again = pretrain(*arguments(tiny, tmp_path, **changes, dataloader_num_workers=2))
    assert losses(tmp_path) == losses(folder) and again["validation_loss"] == summary["validation_loss"]


def test_a_longer_budget_goes_on_at_its_own_rate(tiny, finished, tmp_path):
    folder, _, changes = finished
    shutil.copytree(folder / "checkpoint-8", tmp_path / "checkpoint-8")
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    spent = state["stateful_callbacks"]["BudgetTrainer"]["args"]["clock"]["tokens"]
    pretrain(*arguments(tiny, tmp_path, **{**changes, "budget_tokens": 4 * spent}))
    entries = [entry for entry in json.loads((tmp_path / "history.json").read_text()) if "loss" in entry]
    assert entries[8]["step"] == 9
    assert entries[8]["learning_rate"] == pytest.approx(1e-2 * triangle(0.25), rel=1e-6)


def test_another_batch_or_seed_does_not_go_on_from_a_checkpoint(tiny, finished, tmp_path):
    folder, _, changes = finished
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    for other, message in (
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size is 4 there, 2 here"),
        ({"seed": 3}, "seed is 0 there, 3 here"),
        ({"validation_fraction": 0.5}, "validation_fraction is 0.1 there, 0.5 here"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(*arguments(tiny, tmp_path, **{**changes, **other}))
    (tmp_path / "checkpoint-4" / "run_settings.json").unlink()  # as versions wrote it that did not note settings
    for other, message in (
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size 4, this run has 2"),
        ({"seed": 3}, "data_seed 0, this run has 3"),
        ({"validation_fraction": 0.5}, "train_sequences 238, this run has"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(*arguments(tiny, tmp_path, **{**changes, **other}))


def test_the_folder_tells_what_happened(finished):
    folder, summary, _ = finished
    for name in ("summary.json", "recipe.json", "history.json", "tree_usage.json", "loss.png", "tree_usage.png"):
        assert (folder / name).stat().st_size > 0, name
    card = (folder / "README.md").read_text()
    for text in ("corpus.txt", "budget_tokens", "tokens_per_second", "accuracy", "Not tested"):
        assert text in card, text
    assert 0 <= summary["data_loading_fraction"] < 1 and 0 < summary["validation_accuracy"] < 1
    assert summary["budget"] == {"budget_tokens": 12 * TOKENS_A_STEP}


def test_hours_end_a_run_and_are_counted_over_its_parts(tiny, finished, tmp_path):
    folder, _, changes = finished
    shutil.copytree(folder / "checkpoint-8", tmp_path / "checkpoint-8")
    hours = 1.0 / 3600
    timed = {**changes, "budget_tokens": None, "budget_hours": hours}
    _, summary = pretrain(*arguments(tiny, tmp_path, **timed))
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    before = state["stateful_callbacks"]["BudgetTrainer"]["args"]["clock"]["seconds"]
    assert before > 0 and summary["train_seconds"] >= 1.0 and summary["steps"] > 8


def test_checkpoints_by_time_and_only_the_last_ones_are_kept(tiny, tmp_path, monkeypatch):
    changes = budget(6, save_strategy="no", save_minutes=1e-9, save_total_limit=2)
    pretrain(*arguments(tiny, tmp_path, **changes))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


def poisoned(monkeypatch, bad_steps):
    """Have the loss of these steps (from 1) be NaN."""
    original = budget_trainer.BudgetTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        poison = model.training and self.state.global_step + 1 in bad_steps
        return loss * float("nan") if poison else loss

    monkeypatch.setattr(budget_trainer.BudgetTrainer, "compute_loss", compute_loss)


def test_a_step_that_is_not_finite_changes_no_weight(tiny, tmp_path, monkeypatch):
    poisoned(monkeypatch, {3})
    poisoned_step, before = budget_trainer.BudgetTrainer.training_step, {}

    def training_step(self, model, inputs, *args):
        before[self.state.global_step + 1] = {name: value.clone() for name, value in model.state_dict().items()}
        return poisoned_step(self, model, inputs, *args)

    monkeypatch.setattr(budget_trainer.BudgetTrainer, "training_step", training_step)
    _, summary = pretrain(*arguments(tiny, tmp_path, **budget(6, save_steps=1, max_grad_norm=0.5)))
    assert summary["skipped_steps"] == 1 and summary["rollbacks"] == 0 and summary["steps"] == 6
    assert all(torch.equal(value, before[4][name]) for name, value in before[3].items())
    assert not all(torch.equal(value, before[5][name]) for name, value in before[4].items())
    assert {path.name[11:] for path in tmp_path.glob("checkpoint-*")} == {"1", "2", "4", "5", "6"}
    assert [math.isnan(loss) for loss in losses(tmp_path)] == [step == 3 for step in range(1, 7)]


def test_many_bad_steps_go_back_to_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, caplog):
    poisoned(monkeypatch, {4, 5, 6})
    changes = budget(9, save_steps=2, max_bad_steps=3, max_grad_norm=0)
    _, summary = pretrain(*arguments(tiny, tmp_path, **changes))
    assert (summary["skipped_steps"], summary["rollbacks"]) == (3, 1)
    assert "go back to" in caplog.text
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "checkpoint-8", resumed / "checkpoint-8")
    _, again = pretrain(*arguments(tiny, resumed, **changes))
    assert (again["skipped_steps"], again["rollbacks"]) == (3, 1)
    assert again["validation_loss"] == summary["validation_loss"]


def test_a_run_that_stays_bad_stops_and_leaves_a_good_checkpoint(tiny, tmp_path, monkeypatch):
    poisoned(monkeypatch, range(4, 1000))
    changes = budget(900, save_steps=3, max_bad_steps=2)
    with pytest.raises(ValueError, match=r"after going back 3 times.*checkpoint-3"):
        pretrain(*arguments(tiny, tmp_path, **changes))
    good = AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    for path in tmp_path.glob("checkpoint-*"):  # later ones hold the same weights: nothing was learned since
        for name, value in AutoModelForMaskedLM.from_pretrained(path).state_dict().items():
            assert torch.equal(value, good[name]), (path.name, name)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        pretrain(*arguments(tiny, tmp_path / "none", **budget(900, save_strategy="no", max_bad_steps=5)))


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch, caplog):
    original = budget_trainer.BudgetTrainer.training_step

    def training_step(self, model, inputs, *args):
        if self.state.global_step == 3:
            self.model.get_input_embeddings().weight.data[5, 0] = float("inf")
        return original(self, model, inputs, *args)

    monkeypatch.setattr(budget_trainer.BudgetTrainer, "training_step", training_step)
    with pytest.raises(ValueError, match="diverged"):
        pretrain(*arguments(tiny, tmp_path, **budget(6, save_steps=1)))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert "is not finite" in caplog.text


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tiny, tmp_path, monkeypatch):
    """The operating system refuses files of over 10 kB, as a full disk would."""
    original, limits = budget_trainer.BudgetTrainer.training_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def training_step(self, model, inputs, *args):
        if self.state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return original(self, model, inputs, *args)

    monkeypatch.setattr(budget_trainer.BudgetTrainer, "training_step", training_step)
    try:
        with pytest.raises(ValueError, match=r"checkpoint-4 could not be written.*last good.*checkpoint-2"):
            pretrain(*arguments(tiny, tmp_path, **budget(6, save_steps=2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert pretrain(*arguments(tiny, tmp_path, **budget(6, save_steps=2)))[1]["resumed_from"].endswith("checkpoint-2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget_tokens": 10, "budget_hours": 1.0, "max_steps": -1},
            "expected one budget; got --budget_hours 1 ",
        ),
        ({"budget_tokens": 10}, "expected one budget; got --budget_tokens 10 and --max_steps 6"),
        ({"budget_hours": -1.0, "max_steps": -1}, "budget_hours must be positive; got -1"),
        ({"budget_hours": 1.0, "max_steps": -1, "schedule": "trainer"}, "--schedule trainer counts steps"),
        ({"budget_hours": 1.0, "max_steps": -1, "save_steps": 0.1}, "save_steps 0.1 is a part of max_steps"),
        ({"schedule": "cosine"}, "schedule must be one of triangle, trainer; got 'cosine'"),
        ({"batch_ramp": 1.5}, "batch_ramp must lie between 0 and 1; got 1.5"),
        ({"batch_size": 12}, "batch_size 12 is not a multiple of 8"),
        ({"batch_size": 16, "gradient_accumulation_steps": 2}, "say the same"),
        ({"evaluations": -1}, "evaluations must be zero or above; got -1"),
        ({"max_bad_steps": 0}, "max_bad_steps must be at least 1; got 0"),
        ({"corpus": "absent-corpus"}, "--corpus is already split"),
        ({"corpus": "absent-corpus", "train_file": []}, "holds no manifest.json"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(*arguments(tiny, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_tree_usage_counts_every_visit(finished):
    folder, _, _ = finished
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = torch.randint(5, 19, (6, 16), generator=torch.Generator().manual_seed(0))
    routes = []
    layer = tree_layers(model)[1]
    handle = layer.register_forward_pre_hook(lambda layer, inputs: routes.append(layer.route(inputs[0])))
    with torch.no_grad(), counted_visits(model) as counts:
        before = model(input_ids=ids).logits
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    expected = torch.bincount(routes[0].reshape(-1), minlength=7)
    assert counts[1].tolist() == [expected.tolist()]
    (usage,) = tree_usage([torch.tensor([[8, 8, 0, 4, 4, 0, 0]])])
    assert usage["used_fraction"] == [1.0, 0.5, 0.5] and usage["leaf_entropy"] == 1.0
    assert (usage["dead_nodes"], usage["nodes"], usage["tokens"]) == (3, 7, 8)
