"""Layers fitted one after the other: what each of them sees and learns, with norms behind and in front."""

import pytest
import torch

from fastbert_hf.training.distillation import student_fit
from fastbert_hf.training.distillation.layer_fit import FitSettings
from fastbert_hf.training.distillation.student import student_of
from fastbert_hf.training.distillation.student_fit import fit_student
from tests.training.distillation.encoders import last_error, teacher, text


def behind(layer, residual, x):
    """What stands behind a layer before its norm."""
    return residual + layer.ffn(x)


@torch.no_grad()
def rows_at(model, number, batches):
    """(residual, x) in front of a layer's feed-forward layer, of the tokens that are not padding."""
    layer, found = model.layers[number], {"residual": [], "x": []}
    for batch in batches:
        mask = batch["attention_mask"].bool()
        hidden = model(**batch, output_hidden_states=True).hidden_states[number]
        visible = mask[:, None, None, :]
        if layer.pre_norm:
            residual = hidden + layer.attention(layer.attention_norm(hidden), visible)[0]
            x = layer.ffn_norm(residual)
        else:
            residual = x = layer.attention_norm(hidden + layer.attention(hidden, visible)[0])
        found["residual"].append(residual[mask])
        found["x"].append(x[mask])
    return (torch.cat(parts) for parts in found.values())


@pytest.mark.parametrize("norm_scheme", ["post", "pre"])
def test_a_layer_sees_the_student_and_learns_what_it_still_lacks(norm_scheme, tmp_path, monkeypatch):
    wanted, batches, seen = teacher(norm_scheme), text(), []
    student, fitted = student_of(wanted, "leaf:1x4").model, student_fit.fitted

    def watched(form, dense, x, targets, *rest):
        number = len(seen)
        residual, own = rows_at(student, number, batches)
        torch.testing.assert_close(x, own)
        (theirs, inputs) = rows_at(wanted, number, batches)
        with torch.no_grad():
            lacking = behind(wanted.layers[number], theirs, inputs) - residual
        torch.testing.assert_close(targets, lacking, atol=1e-5, rtol=1e-4)
        seen.append(number)
        return fitted(form, dense, x, targets, *rest)

    monkeypatch.setattr(student_fit, "fitted", watched)
    fit_student(student, wanted, "leaf:1x4", batches, tmp_path, FitSettings(steps=0))
    assert seen == [0, 1, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"layer-{n}.safetensors" for n in range(3)]


@pytest.mark.parametrize("norm_scheme", ["post", "pre"])
def test_a_later_layer_makes_up_for_the_earlier_ones(norm_scheme, tmp_path, monkeypatch):
    wanted, batches, other = teacher(norm_scheme), text(60), text(12, seed=2)
    after, alone = (student_of(wanted, "leaf:1x6").model for _ in range(2))
    fit_student(after, wanted, "leaf:1x6", batches, tmp_path / "after", FitSettings(steps=0))
    fitted = student_fit.fitted

    def by_itself(form, dense, x, targets, *rest):  # each to its dense layer, on the teacher's rows
        _, rows = rows_at(wanted, by_itself.number, batches)
        by_itself.number += 1
        return fitted(form, dense, rows, dense.forward(rows, "gelu"), *rest)

    by_itself.number = 0
    monkeypatch.setattr(student_fit, "fitted", by_itself)
    fit_student(alone, wanted, "leaf:1x6", batches, tmp_path / "alone", FitSettings(steps=0))
    assert last_error(after, wanted, other) < 0.95 * last_error(alone, wanted, other)
