"""How a budget of minutes is divided: a share for the layers, the rest for training, over the parts of a run."""

import itertools
import math
from types import SimpleNamespace

import pytest

from fastbert_hf.training.budget import BudgetClock
from fastbert_hf.training.distillation import stages, student_fit, texts
from fastbert_hf.training.distillation.run import FIT_SHARE, REFIT_SHARE
from fastbert_hf.training.distillation.texts import in_time
from tests.training.distillation.runs import distill


class Clock:
    """Seconds that pass when a test says so, in place of the module `time`."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for module in (stages, student_fit, texts):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        ticks = itertools.count(0, 10)  # each step of training takes ten
        monkeypatch.setattr(BudgetClock, "_read", lambda self: (float(next(ticks)), 0.0))


def test_the_layers_get_a_share_of_the_budget_over_all_parts_of_a_run(tiny, bert, tmp_path, monkeypatch):
    clock, given = Clock(monkeypatch), []

    def fit(layer, x, targets, settings, seconds):
        given.append(seconds)
        if len(given) == 2:
            raise KeyboardInterrupt
        clock.now += min(seconds, 4.0)

    monkeypatch.setattr(student_fit, "fit_layer", fit)
    options = {"max_steps": None, "budget_minutes": 1.0}
    with pytest.raises(KeyboardInterrupt):
        distill(bert, tiny / "corpus.txt", tmp_path, **options)
    summary = distill(bert, tiny / "corpus.txt", tmp_path, **options)
    share = 60 * FIT_SHARE
    assert given == pytest.approx([share / 2, share - 4, share - 4])
    assert summary["fit_seconds"] == 8 and summary["steps"] == math.ceil((60 - 8) / 10)


def test_layers_that_take_too_long_leave_the_rest_to_training(tiny, bert, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)

    def make(*arguments):
        clock.now += 20  # longer than the share of both layers
        return make_layer(*arguments)

    make_layer = student_fit.make_layer
    monkeypatch.setattr(student_fit, "make_layer", make)
    summary = distill(bert, tiny / "corpus.txt", tmp_path, max_steps=None, budget_minutes=1.0)
    assert summary["fit_seconds"] == 40 and summary["steps"] == 2


def test_solving_the_output_weights_has_a_share_of_its_own(tiny, bert, tmp_path, monkeypatch):
    Clock(monkeypatch)
    summary = distill(bert, tiny / "corpus.txt", tmp_path, max_steps=None, budget_minutes=2.0, refit=True)
    assert summary["steps"] == math.ceil(120 * (1 - REFIT_SHARE) / 10) < 12


def test_batches_are_taken_until_the_time_is_over(monkeypatch):
    clock = Clock(monkeypatch)

    def batches():
        for number in range(9):
            clock.now += 3
            yield number

    assert list(in_time(batches(), 7)) == [0, 1, 2]
    assert list(in_time(batches(), 0)) == [0]
    assert list(in_time(batches(), math.inf)) == list(range(9))
