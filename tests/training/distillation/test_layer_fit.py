"""Fitting one layer to another: the figure is right, fits learn, and the command writes a table."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from fastbert_hf import FastFeedForward, LeafFeedForward
from fastbert_hf.training.budget import BudgetClock
from fastbert_hf.training.distillation.fit_table import LayerFitArguments, fit_table
from fastbert_hf.training.distillation.layer_fit import (
    DenseFeedForward,
    FitSettings,
    FlatLeaves,
    fit_layer,
    make_layer,
    neurons_per_token,
    outputs_of,
    standardized,
    unexplained,
)
from fastbert_hf.training.start_from_data import DenseWeights
from tests.processes import CHILD_SECONDS

SCRIPT = Path(__file__).parents[3] / "scripts" / "fit_layers.py"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    """A dense layer of 48 neurons with outputs of unequal size, and rows in four heaps: dense, x, other rows."""
    parts = [draw(48, 10, seed=1) * 0.5, draw(48, seed=2) * 0.5, draw(6, 48, seed=3), draw(6, seed=4)]
    dense = DenseWeights(*parts)._replace(weight_out=parts[2] * torch.logspace(-2, 2, 6).unsqueeze(1))
    centres = 2 * draw(4, 10, seed=5)
    x, other = (
        centres[torch.arange(count) % 4] + draw(count, 10, seed=seed) for count, seed in ((3000, 6), (800, 7))
    )
    return dense, x, other


def test_standardized_outputs_have_mean_zero_and_variance_one(problem):
    dense, x, _ = problem
    constant = dense._replace(weight_out=dense.weight_out.index_fill(0, torch.tensor([2]), 0.0))
    for layer in (dense, dense._replace(bias_out=None), constant):
        y = outputs_of(standardized(layer, x, "gelu"), x, "gelu")
        torch.testing.assert_close(y.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
        expected = torch.ones(6) if layer is not constant else torch.ones(6).index_fill(0, torch.tensor([2]), 0.0)
        torch.testing.assert_close(y.var(0, correction=0), expected, atol=1e-4, rtol=0)


def test_unexplained_is_one_for_the_mean_and_counts_every_dimension_alike():
    targets = draw(500, 3) * torch.tensor([0.01, 1.0, 100.0])
    x = draw(500, 2)

    class Answer(nn.Module):
        def __init__(self, y):
            super().__init__()
            self.y = y

        def forward(self, x):
            return self.y

    assert unexplained(Answer(targets.mean(0).expand(500, 3)), x, targets) == pytest.approx(1, abs=1e-5)
    half = torch.where(torch.tensor([True, True, False]), targets, targets.mean(0))
    assert unexplained(Answer(half), x, targets) == pytest.approx(1 / 3, abs=1e-5)
    assert unexplained(Answer(targets), x, targets) == 0
    constant = targets.index_fill(1, torch.tensor([0]), 5.0)
    assert unexplained(Answer(constant), x, constant) == 0


@pytest.mark.parametrize(
    "form, kind, neurons",
    [
        ("dense:5", DenseFeedForward, 5),
        ("tree:2x3", FastFeedForward, 8),
        ("leaf:2x6", LeafFeedForward, 6),
        ("leaf:2x2x3", LeafFeedForward, 6),
        ("flat:4x6", FlatLeaves, 6),
    ],
)
def test_every_form_learns_and_repeats_itself(problem, form, kind, neurons):
    dense, x, other = problem
    dense = standardized(dense, x, "gelu")
    targets, other_targets = outputs_of(dense, x, "gelu"), outputs_of(dense, other, "gelu")
    results = []
    for state in (0, 1):
        torch.manual_seed(state)  # plays no part
        layer = make_layer(form, dense, x, "gelu", seed=0)
        assert isinstance(layer, kind) and neurons_per_token(layer) == neurons
        before = unexplained(layer, other, other_targets)
        error = fit_layer(layer, x, targets, FitSettings(steps=60, rows_per_step=256, learning_rate=1e-2))
        results.append(unexplained(layer, other, other_targets))
        assert results[-1] < 0.9 * before and error < 0.9 * before
    assert results[0] == results[1]


def test_leaves_do_more_than_a_dense_layer_of_as_many_active_neurons(problem):
    dense, x, other = problem
    dense = standardized(dense, x, "gelu")
    targets, other_targets = outputs_of(dense, x, "gelu"), outputs_of(dense, other, "gelu")
    left = {}
    for form in ("dense:6", "leaf:2x6", "flat:4x6"):
        layer = make_layer(form, dense, x, "gelu")
        fit_layer(layer, x, targets, FitSettings(steps=200, rows_per_step=256, learning_rate=1e-2))
        left[form] = unexplained(layer, other, other_targets)
    assert left["leaf:2x6"] < 0.9 * left["dense:6"] and left["flat:4x6"] < 0.9 * left["dense:6"]


def test_flat_leaves_are_a_weighted_leaf_by_definition(problem):
    dense, x, _ = problem
    layer = make_layer("flat:4x3", dense, x, "gelu").requires_grad_(False)
    probabilities = (x @ layer.router.T + layer.offset).softmax(-1)
    for row in range(0, 40):
        leaf = int(probabilities[row].argmax())
        hidden = nn.functional.gelu(layer.weight_in[leaf] @ x[row] + layer.bias_in[leaf])
        expected = probabilities[row, leaf] * (hidden @ layer.weight_out[leaf] + layer.bias_out[leaf])
        torch.testing.assert_close(layer(x)[row], expected, atol=1e-4, rtol=1e-4)
    taken = torch.bincount(probabilities.argmax(-1), minlength=4)
    assert taken.min() > len(x) / 40


def test_a_fit_of_no_steps_changes_nothing(problem):
    dense, x, _ = problem
    layer = make_layer("leaf:2x4", dense, x, "gelu")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert math.isnan(fit_layer(layer, x, outputs_of(dense, x, "gelu"), FitSettings(steps=0)))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_fit_ends_with_its_time_and_its_rate_is_zero_then(problem, monkeypatch):
    dense, x, _ = problem
    targets, results = outputs_of(dense, x, "gelu"), []
    for steps, seconds in ((10, math.inf), (1000, 10.0), (0, math.inf), (1000, 0.0)):
        ticks = itertools.count()  # each step takes one second
        monkeypatch.setattr(BudgetClock, "_read", lambda self, ticks=ticks: (float(next(ticks)), 0.0))
        layer = make_layer("leaf:2x4", dense, x, "gelu")
        error = fit_layer(layer, x, targets, FitSettings(steps, rows_per_step=64), seconds)
        results.append((error, next(ticks), layer.weight_in.detach()))
    by_steps, by_time, *none = results
    assert by_steps[1] == by_time[1] == 11 and by_time[0] == pytest.approx(by_steps[0])
    torch.testing.assert_close(by_time[2], by_steps[2])
    assert all(math.isnan(error) and torch.equal(weight, none[0][2]) for error, _, weight in none)


def test_a_fit_that_diverges_is_named(problem):
    dense, x, _ = problem
    targets = outputs_of(dense, x, "gelu").index_fill(0, torch.arange(3000), torch.inf)
    with pytest.raises(ValueError, match="the fit diverged at step 0"):
        fit_layer(make_layer("dense:4", dense, x, "gelu"), x, targets)


@pytest.mark.parametrize("form", ["dense", "dense:0", "leaf:5", "leaf:1x2x3x4", "flat:6x3", "moe:3x3", "tree:-1x3"])
def test_unknown_forms_are_named(problem, form):
    dense, x, _ = problem
    with pytest.raises(ValueError, match="expected"):
        make_layer(form, dense, x, "gelu")


# ---- the command


@pytest.fixture
def bert(tiny, tmp_path):
    """A tiny BERT with the tokenizer of the tiny corpus."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=150, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "bert")
    for file in (tiny / "tokenizer").iterdir():
        (tmp_path / "bert" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "bert"


def options(bert, tiny, output_dir, **changes):
    (bert.parent / "pairs.jsonl").write_text('{"a": "the river flows", "b": "under stone", "label": 1}\n')
    files = [str(tiny / "corpus.txt"), str(bert.parent / "pairs.jsonl")]
    values = {"train_file": files, "other_file": files[:1], "layer": 1, "steps": 5, "rows_per_step": 64}
    values |= {"texts_per_file": 40, "other_texts_per_file": 10, "forms": ["leaf:2x4", "dense:4"]}
    return LayerFitArguments(str(bert), output_dir=str(output_dir), **{**values, **changes})


def test_texts_are_cut_to_what_the_model_reads(bert, tiny, tmp_path):
    (tmp_path / "long.txt").write_text("the river flows under stone " * 40 + "\n")
    fit_table(options(bert, tiny, tmp_path / "out", train_file=[str(tmp_path / "long.txt")], forms=["dense:1"]))
    assert json.loads((tmp_path / "out" / "layer-fit.json").read_text())["rows"] == 32


def test_the_table_is_written_and_the_activations_are_removed(bert, tiny, tmp_path):
    results = fit_table(options(bert, tiny, tmp_path / "out"))
    assert [row["form"] for row in results] == ["leaf:2x4", "dense:4"] and results[0]["neurons"] == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["layer-fit.json", "layer-fit.md"]
    stored = json.loads((tmp_path / "out" / "layer-fit.json").read_text())
    assert stored["model"] == "bert"  # without the folders of this machine
    assert stored["results"] == results and stored["rows"] > 400 and stored["steps"] == 5
    assert "| leaf:2x4 | 4 |" in (tmp_path / "out" / "layer-fit.md").read_text()
    again = fit_table(options(bert, tiny, tmp_path / "again"))
    assert [row["unexplained"] for row in again] == [row["unexplained"] for row in results]
    tables = {"train_file": [str(tmp_path / "pairs.jsonl")], "other_file": [str(tmp_path / "pairs.jsonl")]}
    assert fit_table(options(bert, tiny, tmp_path / "tables", **tables, forms=["dense:1"]))[0]["neurons"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"forms": ["leaf"]}, "unknown form 'leaf'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"balance_leaves": -1.0}, "0 or above; got -1"),
        ({"train_file": ["absent.txt"]}, "'absent.txt' does not exist"),
        ({"other_file": ["absent.jsonl"]}, "'absent.jsonl' does not exist"),
        ({"layer": 2}, "layer is 2; expected 0 to 1"),
    ],
)
def test_mistakes_are_named_before_the_work(bert, tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fit_table(options(bert, tiny, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_command_says_one_line(tmp_path):
    arguments = ["--model_name_or_path", str(tmp_path / "absent"), "--train_file", "a", "--other_file", "b"]
    command = [sys.executable, str(SCRIPT), *arguments, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
