"""Private methods of Trainer that are overridden exist and are called, or a run ends before it begins."""

import inspect

import pytest
from transformers import Trainer

from fastbert_hf.training.budget_trainer import BudgetTrainer
from fastbert_hf.training.glue.finetuning import ClassifierTrainer
from fastbert_hf.training.pretraining.run import pretrain
from fastbert_hf.training.trainer_hooks import check_hooks
from tests.training.runs import arguments

TRAINERS = (BudgetTrainer, ClassifierTrainer)


@pytest.mark.parametrize("subclass", TRAINERS)
def test_every_method_that_is_overridden_is_listed_and_used(subclass):
    overridden = {
        name for name, member in vars(subclass).items() if inspect.isfunction(member) and hasattr(Trainer, name)
    }
    assert overridden - {"__init__"} <= set(subclass.HOOKS)
    check_hooks(subclass)


class Renamed(Trainer):
    """A release in which a method has another name, but a stub keeps the old one."""

    def _get_grad_norm(self, model, grad_norm=None):
        return self._gradient_norm(model, grad_norm)

    def set_only(self):
        self.current_gradient_accumulation_steps = 1


@pytest.mark.parametrize("name", [*BudgetTrainer.HOOKS, *BudgetTrainer.SETTINGS])
def test_a_hook_that_is_gone_is_named(name):
    class Stripped:
        """Trainer without the method, and without whatever reads the name."""

    def reads(function):
        return inspect.isfunction(function) and name in inspect.getsource(inspect.unwrap(function))

    for key, member in vars(Trainer).items():
        if key != name and not key.startswith("__") and not reads(member):
            setattr(Stripped, key, member)
    with pytest.raises(ValueError, match=rf"no longer uses .*Trainer\.{name}\b.*BudgetTrainer"):
        check_hooks(BudgetTrainer, Stripped)


def test_a_hook_that_stays_but_is_called_no_more_is_named():
    with pytest.raises(ValueError, match=r"Trainer\._get_grad_norm.*Trainer\.current_gradient_accumulation_steps"):
        check_hooks(BudgetTrainer, Renamed)


def test_pretraining_ends_before_any_work_where_a_hook_is_gone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(BudgetTrainer, "HOOKS", (*BudgetTrainer.HOOKS, "_renamed_long_ago"))
    with pytest.raises(ValueError, match="_renamed_long_ago"):
        pretrain(*arguments(tiny, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
