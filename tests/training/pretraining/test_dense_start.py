"""Leaf trees that begin where a dense run stands: same place, same other weights, dense neurons in their leaves."""

import itertools
import json
import shutil

import pytest
import torch
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.training.pretraining.comparison import read_run
from fastbert_hf.training.pretraining.dense_start import optimizer_order
from fastbert_hf.training.pretraining.run import pretrain
from tests.training.conftest import TINY_MODEL
from tests.training.runs import arguments

DENSE = TINY_MODEL + "ffn_type: dense\nintermediate_size: 12\n"
LEAVES = TINY_MODEL + "fff_leaf_width: 12\n"  # as many neurons in each of four leaves


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "dense.yaml").write_text(DENSE)
    (folder / "leaves.yaml").write_text(LEAVES)
    return folder


@pytest.fixture(scope="module")
def dense(tiny, recipes, tmp_path_factory):
    """The folder of a finished dense run of six steps, with a checkpoint after three."""
    folder = tmp_path_factory.mktemp("dense") / "out"
    pretrain(*arguments(tiny, folder, model_config=str(recipes / "dense.yaml"), evaluations=6, logging_steps=1))
    return folder


def begin(tiny, recipes, dense, folder, **changes):
    changes = {"model_config": str(recipes / "leaves.yaml"), "evaluations": 6, "logging_steps": 1, **changes}
    changes.setdefault("dense_checkpoint", str(dense / "checkpoint-3"))
    return pretrain(*arguments(tiny, folder, **changes))


@pytest.fixture(scope="module")
def started(tiny, recipes, dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaves") / "out"
    return folder, *begin(tiny, recipes, dense, folder)


def test_run_goes_on_from_the_place_of_the_dense_one(dense, started):
    folder, _, summary = started
    assert summary["steps"] == 6 and summary["tokens_seen"] == 6 * 8 * 16
    assert summary["resumed_from"] == str(folder / "checkpoint-3")
    ours, theirs = (json.loads((run / "history.json").read_text()) for run in (folder, dense))
    before = [entry for entry in theirs if entry["step"] <= 3]
    assert before and ours[: len(before)] == before  # the curve holds the dense part
    rates = [[entry["learning_rate"] for entry in log if "learning_rate" in entry] for log in (ours, theirs)]
    assert rates[0] == pytest.approx(rates[1])


def test_summary_and_recipe_say_what_the_run_began_from(dense, started):
    folder, _, summary = started
    assert summary["dense_start"] == {"neurons": 12, "fraction": 0.5}
    assert json.loads((dense / "summary.json").read_text())["dense_start"] is None
    assert read_run(folder).model == "leaves 4x12 from dense 12 at 50%"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["earlier_part_1"] == "max_steps 6, world_size 1, fp32, dense layers of 12, until step 3"


def test_everything_but_the_trees_is_taken_over_with_its_moments(dense, started):
    folder, _, _ = started
    ours, theirs = (AutoModelForMaskedLM.from_pretrained(run / "checkpoint-3") for run in (folder, dense))
    states = [torch.load(run / "checkpoint-3" / "optimizer.pt", weights_only=True) for run in (folder, dense)]
    names = [list(itertools.chain(*optimizer_order(model))) for model in (ours, theirs)]
    assert any(".ffn." in name for name in names[0])
    for number, name in enumerate(names[0]):
        if ".ffn." in name:
            assert number not in states[0]["state"], name
            continue
        assert torch.equal(ours.state_dict()[name], theirs.state_dict()[name]), name
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            there = states[1]["state"][names[1].index(name)][moment]
            assert torch.equal(states[0]["state"][number][moment], there), (name, moment)


def test_order_of_the_optimizer_is_that_of_trainer(dense, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(dense)
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    assert [[names[id(each)] for each in group["params"]] for group in groups] == optimizer_order(model)


def test_leaves_as_wide_as_the_dense_layer_begin_near_its_outputs(dense, started):
    folder, _, _ = started
    ours, theirs = (AutoModelForMaskedLM.from_pretrained(run / "checkpoint-3").eval() for run in (folder, dense))
    torch.manual_seed(0)
    x = torch.randn(500, 16)
    for tree, layer in zip(ours.fastbert.layers, theirs.fastbert.layers, strict=True):
        for leaf in tree.ffn.weight_in.view(4, 12, 16):  # each has all neurons of the dense layer
            distances = torch.cdist(leaf, layer.ffn.dense_in.weight)
            assert distances.min(0).values.max() < 1e-6 and distances.min(1).values.max() < 1e-6
        with torch.no_grad():
            wanted = layer.ffn(x)
            error = (tree.ffn(x) - wanted).square().mean() / wanted.var()
        assert error < 0.5  # its random start has 1 and more


def test_interrupted_run_goes_on_and_ends_with_the_same_weights(tiny, recipes, dense, started, tmp_path):
    folder, model, _ = started
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    again, _ = begin(tiny, recipes, dense, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_dense_model_goes_on_as_it_is(tiny, recipes, dense, tmp_path):
    model, summary = begin(tiny, recipes, dense, tmp_path, model_config=str(recipes / "dense.yaml"))
    assert summary["dense_start"] == {"neurons": 12, "fraction": 0.5}
    whole = AutoModelForMaskedLM.from_pretrained(dense).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())


def test_a_mistake_leaves_the_checkpoints_of_an_earlier_run(tiny, recipes, dense, started, tmp_path):
    shutil.copytree(started[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "broken").mkdir()
    changes = {"overwrite_output_dir": True, "dense_checkpoint": str(tmp_path / "broken")}
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        begin(tiny, recipes, dense, tmp_path, **changes)
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()


def test_a_fresh_start_beside_old_checkpoints_begins_dense_too(tiny, recipes, dense, started, tmp_path):
    shutil.copytree(started[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    model, summary = begin(tiny, recipes, dense, tmp_path, resume_from_checkpoint="none")
    assert summary["resumed_from"] == str(tmp_path / "checkpoint-3")
    for name, value in started[1].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_another_dense_checkpoint_is_refused(tiny, recipes, dense, started, tmp_path):
    shutil.copytree(started[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="dense_checkpoint is"):
        begin(tiny, recipes, dense, tmp_path, dense_checkpoint=str(dense / "checkpoint-6"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0, this run has 1"),
        ({"max_seq_length": 8}, "max_seq_length 16, this run has 8"),
        ({"dense_checkpoint": "nowhere"}, "holds no trainer_state.json"),
        ({"recipe": "published"}, "is for leaf trees and dense models"),
        ({"recipe": "denser"}, r"dense_in\.weight is \(12, 16\) in the dense checkpoint and \(13, 16\)"),
        ({"recipe": "wider"}, r"\(16,\) in the dense checkpoint and \(32,\)"),
        ({"recipe": "deeper"}, "layers.2"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tiny, recipes, dense, tmp_path, changes, message):
    (tmp_path / "wider").write_text(LEAVES.replace("hidden_size: 16", "hidden_size: 32"))
    (tmp_path / "published").write_text(TINY_MODEL)
    (tmp_path / "denser").write_text(DENSE.replace("intermediate_size: 12", "intermediate_size: 13"))
    (tmp_path / "deeper").write_text(LEAVES.replace("layers: 2", "layers: 3"))
    changes = dict(changes)
    if recipe := changes.pop("recipe", None):
        found = recipes / recipe
        changes["model_config"] = str(found if found.exists() else tmp_path / recipe)
    with pytest.raises(ValueError, match=message):
        begin(tiny, recipes, dense, tmp_path / "out", **changes)
    assert not list((tmp_path / "out").glob("*"))


def test_checkpoint_of_trees_is_refused(tiny, recipes, started, tmp_path):
    with pytest.raises(ValueError, match="not a plain dense one"):
        begin(tiny, recipes, started[0], tmp_path)
