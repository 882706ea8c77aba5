"""Output weights solved once more at the end of a distillation: by least squares, and kept where it helps."""

import re

import pytest
import torch
from transformers import AutoModel

from fastbert_hf import LeafFeedForward
from fastbert_hf.training import neuron_choice
from fastbert_hf.training.distillation import run
from fastbert_hf.training.distillation.layer_fit import FitSettings
from fastbert_hf.training.distillation.refit import refit_layer, refit_student
from fastbert_hf.training.distillation.student import student_of
from fastbert_hf.training.distillation.student_fit import fit_student
from tests.training.distillation.encoders import last_error, teacher, text
from tests.training.distillation.runs import distill


@pytest.mark.parametrize("form", ["leaf:1x6", "leaf:2x1x3", "leaf:0x6", "dense:6"])
@pytest.mark.parametrize("norm_scheme", ["post", "pre"])
def test_output_weights_are_solved_once_more(norm_scheme, form, tmp_path):
    wanted, batches, other = teacher(norm_scheme), text(60), text(12, seed=2)
    student = student_of(wanted, form)
    fit_student(student.model, wanted, form, batches, tmp_path / "fit", FitSettings(steps=0))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "_out" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    error = last_error(student.model, wanted, other)
    refit_student(student, wanted, batches, tmp_path / "rows")
    assert last_error(student.model, wanted, other) < 0.9 * error
    changed = {name for name, value in student.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("weight_out" in name or "bias_out" in name or "dense_out" in name for name in changed)
    assert not (tmp_path / "rows").exists()


def test_solved_weights_are_those_of_least_squares(monkeypatch):
    monkeypatch.setattr(neuron_choice, "PRIOR_ROWS", 0)
    draw = torch.Generator().manual_seed(3)
    x, targets = torch.randn(900, 8, generator=draw), torch.randn(900, 5, generator=draw)
    layer = LeafFeedForward(8, 5, depth=1, leaf_width=4, initializer_range=0.5)
    refit_layer(layer, x, targets, "gelu")
    leaf, confidence = layer.route(x)
    for number in range(2):
        rows, neurons = leaf[:, 0] == number, slice(4 * number, 4 * number + 4)
        with torch.no_grad():
            hidden = torch.nn.functional.gelu(x[rows] @ layer.weight_in[neurons].T + layer.bias_in[neurons])
        features = torch.cat([hidden, torch.ones(len(hidden), 1)], 1) * confidence[rows]
        solution = torch.linalg.lstsq(features.double(), targets[rows].double()).solution.float()
        torch.testing.assert_close(layer.weight_out[neurons].detach(), solution[:4], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.bias_out[number].detach(), solution[4], atol=1e-4, rtol=1e-4)


def test_the_published_form_stays_as_it_is(tmp_path):
    wanted = teacher("post")
    student = student_of(wanted, "tree:1x2")
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    refit_student(student, wanted, iter(()), tmp_path / "rows")  # the text is not read
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())


def test_fewer_layers_follow_those_of_the_teacher(tmp_path):
    wanted, batches = teacher("post"), text(60)
    student = student_of(wanted, "layers:2")
    error = last_error(student.model, wanted, batches)
    refit_student(student, wanted, batches, tmp_path / "rows")
    assert last_error(student.model, wanted, batches) < 0.9 * error


@pytest.mark.slow
@pytest.mark.parametrize("better", [True, False])
def test_solved_output_weights_are_kept_if_they_are_better(tiny, bert, tmp_path, monkeypatch, capsys, better):
    plain = distill(bert, tiny / "corpus.txt", tmp_path / "plain")
    assert "refit" not in plain

    def spoil(student, *arguments, **keywords):
        refit_student(student, *arguments, **keywords)
        if not better:
            with torch.no_grad():
                student.encoder.layers[1].ffn.weight_out.mul_(3)

    monkeypatch.setattr(run, "refit_student", spoil)
    summary = distill(bert, tiny / "corpus.txt", tmp_path / "refit", refit=True)
    solved = r"output weights solved in \d+ s: held-out loss \d+\.\d+ before, \d+\.\d+ after"
    assert re.search(solved + ("$" if better else "; left as they were$"), capsys.readouterr().out, re.MULTILINE)
    assert summary["refit"] is better and summary["trained_hidden_error"] == plain["eval_hidden_error"]
    assert (summary["eval_hidden_error"] < plain["eval_hidden_error"]) is better
    models = [AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "refit")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items()) is not better
    assert ("output weights solved once more" in (tmp_path / "refit" / "distillation.md").read_text()) is better
