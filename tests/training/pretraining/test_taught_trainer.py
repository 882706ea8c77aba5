"""Pretraining with a teacher: what the loss is, that it helps, resumes, and refuses what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece
from fastbert_hf.training.pretraining.comparison import read_run
from fastbert_hf.training.pretraining.data import load_pretraining_data
from fastbert_hf.training.pretraining.run import pretrain
from fastbert_hf.training.pretraining.taught_trainer import TaughtTrainer
from fastbert_hf.training.teaching import divergence
from tests.training.conftest import TINY_MODEL
from tests.training.runs import arguments, losses


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """A finished dense run."""
    folder = tmp_path_factory.mktemp("teacher") / "out"
    (folder.parent / "dense.yaml").write_text(TINY_MODEL + "ffn_type: dense\nintermediate_size: 12\n")
    pretrain(*arguments(tiny, folder, model_config=str(folder.parent / "dense.yaml"), max_steps=30))
    return folder


def taught(tiny, teacher, folder, **changes):
    changes = {"teacher_name_or_path": str(teacher), "teacher_weight": 0.7, "logging_steps": 1, **changes}
    return pretrain(*arguments(tiny, folder, **changes))


@pytest.mark.parametrize("sparse", [True, False])
def test_the_loss_is_both_parts_at_predicted_positions(tiny, teacher, tmp_path, monkeypatch, sparse):
    seen = []
    compute_loss = TaughtTrainer.compute_loss

    def recorded(trainer, model, inputs, **options):
        found = compute_loss(trainer, model, inputs, **options)
        if model.training and not seen:
            loss, other = model(**inputs).loss, AutoModelForMaskedLM.from_pretrained(teacher).eval()
            predicted = inputs["labels"] >= 0
            model.eval()
            with torch.no_grad():
                wanted = divergence(
                    model(input_ids=inputs["input_ids"]).logits[predicted],
                    other(input_ids=inputs["input_ids"]).logits[predicted],
                )
            model.train()
            seen.append((found.item(), (0.3 * loss + 0.7 * wanted).item()))
        return found

    monkeypatch.setattr(TaughtTrainer, "compute_loss", recorded)
    taught(tiny, teacher, tmp_path, sparse_prediction=sparse, max_steps=2)
    ((found, wanted),) = seen
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_student_of_the_teacher_alone_comes_nearer_to_it(tiny, teacher, tmp_path):
    """A teacher with random weights says what no text does."""
    config = AutoConfig.from_pretrained(teacher, initializer_range=0.5)
    torch.manual_seed(0)
    teacher, models = tmp_path / "random", {}
    AutoModelForMaskedLM.from_config(config).save_pretrained(teacher)
    load_tokenizer(tiny / "tokenizer").save_pretrained(teacher)
    for weight in (0.0, 1.0):
        models[weight], summary = taught(
            tiny, teacher, tmp_path / str(weight), teacher_weight=weight, max_steps=40, save_strategy="no"
        )
        assert summary["validation_loss"] > 0
    options, _ = arguments(tiny, tmp_path / "0.0", corpus=f"{tmp_path / '0.0'}-corpus")
    held = load_pretraining_data(options, load_tokenizer(tiny / "tokenizer"), 8, 77, seed=0).validation
    predicted = held.labels >= 0

    def said(model):
        with torch.no_grad():
            return model.eval()(input_ids=held.input_ids).logits[predicted]

    wanted = said(AutoModelForMaskedLM.from_pretrained(teacher))
    distance = {weight: divergence(said(model), wanted) for weight, model in models.items()}
    assert distance[1.0] < 0.8 * distance[0.0]


def test_a_taught_run_resumes_and_counts_its_teacher_as_a_setting(tiny, teacher, tmp_path):
    taught(tiny, teacher, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    state = tmp_path / "again" / "checkpoint-3" / "trainer_state.json"  # as versions before kept the clock
    state.write_text(state.read_text().replace('"BudgetTrainer"', '"TaughtTrainer"'))
    _, again = taught(tiny, teacher, tmp_path / "again")
    assert again["resumed_from"].endswith("checkpoint-3") and losses(tmp_path / "whole") == losses(tmp_path / "again")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((tmp_path / "whole" / "recipe.json").read_text())["teacher_weight"] == 0.7
    assert read_run(tmp_path / "whole").model == "FastBERT 1x2, taught"
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    with pytest.raises(ValueError, match=r"teacher_weight is 0\.7 there"):
        taught(tiny, teacher, tmp_path / "again", teacher_weight=0.2)
    with pytest.raises(ValueError, match=r"teacher is '.*' there, None here"):
        taught(tiny, teacher, tmp_path / "again", teacher_name_or_path=None)


def test_a_run_without_teacher_begins_where_a_taught_one_stands(tiny, teacher, tmp_path):
    """Whatever kind of run wrote a checkpoint, its clock is found."""
    recipes = {"dense": str(teacher.parent / "dense.yaml"), "leaves": str(tmp_path / "leaves.yaml")}
    (tmp_path / "leaves.yaml").write_text(TINY_MODEL + "fff_leaf_width: 12\n")
    taught(tiny, teacher, tmp_path / "dense", model_config=recipes["dense"])
    start = {"dense_checkpoint": str(tmp_path / "dense" / "checkpoint-3")}
    _, plain = pretrain(*arguments(tiny, tmp_path / "plain", model_config=recipes["leaves"], **start))
    _, again = taught(tiny, teacher, tmp_path / "taught", model_config=recipes["leaves"], **start)
    assert plain["steps"] == again["steps"] == 6 and plain["dense_start"]["fraction"] == 0.5
    state = json.loads((tmp_path / "taught" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["BudgetTrainer"]["args"]["clock"]["steps"] == 6


def test_a_teacher_that_does_not_fit_is_refused(tiny, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"between 0 and 1; got 1\.5"):
        taught(tiny, teacher, tmp_path / "out", teacher_weight=1.5)
    with pytest.raises(ValueError, match="no teacher can be loaded from"):
        taught(tiny, tmp_path / "nowhere", tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    lines = [f"another text of {number} lines" for number in range(200)]
    save_tokenizer(train_wordpiece(lines, vocab_size=77, model_max_length=32), other)
    with pytest.raises(ValueError, match="has another tokenizer than this run"):
        taught(tiny, other, tmp_path / "out")
    wide = tmp_path / "wide.yaml"
    wide.write_text(TINY_MODEL + "vocab_size: 200\n")
    with pytest.raises(ValueError, match="has a vocabulary of 77, not 200"):
        taught(tiny, teacher, tmp_path / "out", model_config=str(wide))
    assert not (tmp_path / "out").exists()
