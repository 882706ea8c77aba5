"""Transformers' Trainer: accumulation, checkpointing, resuming and what it saves."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from fastbert_hf import FastBertForMaskedLM, FastBertForSequenceClassification
from tests.clients.helpers import FORMS, random_batch, tiny_model

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def examples(count: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    inputs = random_batch(count, length, seed=1)
    return [{name: tensor[row] for name, tensor in inputs.items()} for row in range(count)]


def masked_lm_examples(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """One to four labels an example: microbatches differ in their number of labels."""
    dataset = examples(count)
    for row, example in enumerate(dataset):
        labels = torch.full_like(example["input_ids"], -100)
        places = torch.arange(row % 4 + 1) * 2
        labels[places] = example["input_ids"][places]
        example["labels"] = labels
    return dataset


def classification_examples(count: int = 16) -> list[dict[str, torch.Tensor]]:
    return [{**example, "labels": torch.tensor(row % 2)} for row, example in enumerate(examples(count))]


TASKS = {
    "masked_lm": (FastBertForMaskedLM, masked_lm_examples, AutoModelForMaskedLM),
    "classification": (
        FastBertForSequenceClassification,
        classification_examples,
        AutoModelForSequenceClassification,
    ),
}
each_task = pytest.mark.parametrize("task", TASKS)


def trainer(task: str, folder: Path, config: dict | None = None, **arguments) -> Trainer:
    """A Trainer on the CPU with a model of fixed seed, four examples a step and six steps unless told otherwise."""
    model_class, dataset, _ = TASKS[task]
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 3,
    }
    return Trainer(
        model=tiny_model(model_class, **(config or {})),
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=dataset(),
        eval_dataset=dataset(),
    )


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


@each_task
@pytest.mark.parametrize("form", FORMS)
def test_training_lowers_the_loss_and_saves_a_folder_that_opens_with_its_code(task, form, tmp_path):
    run = trainer(task, tmp_path, NO_DROPOUT | FORMS[form], max_steps=12)
    before = run.evaluate()["eval_loss"]
    run.train()
    evaluation = run.evaluate()
    assert evaluation["eval_loss"] < before
    run.save_model()
    assert all((tmp_path / name).exists() for name in ("modeling_fastbert.py", "fff_op.py", "leaf_op.py"))

    model = TASKS[task][2].from_pretrained(tmp_path).eval()
    batch = {name: torch.stack([e[name] for e in run.eval_dataset]) for name in run.eval_dataset[0]}
    with torch.no_grad():
        loss = model(**batch).loss.item()
    if task == "classification":  # batches of equal size: the mean of means is the mean
        assert evaluation["eval_loss"] == pytest.approx(loss, rel=1e-5)
    predictions = run.predict(run.eval_dataset).predictions
    rows = len(run.eval_dataset)
    assert predictions.shape == ((rows, 12, model.config.vocab_size) if task == "masked_lm" else (rows, 2))


@each_task
def test_accumulated_and_checkpointed_steps_are_the_steps_of_whole_batches(task, tmp_path):
    """The loss of a step is a mean over all of its labels, however it is cut."""
    arguments = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 3}
    whole = trainer(task, tmp_path / "whole", NO_DROPOUT, **arguments)
    start = weights(whole)
    whole.train()
    cut = trainer(
        task,
        tmp_path / "cut",
        NO_DROPOUT,
        **arguments,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
    )
    cut.train()
    assert cut.model.is_gradient_checkpointing
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], expected, rtol=1e-5, atol=1e-6)
    moved = [name for name, tensor in weights(whole).items() if (tensor - start[name]).abs().max() > 1e-3]
    assert any("ffn.weight_in" in name for name in moved) and any("ffn.weight_out" in name for name in moved)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (cut, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@each_task
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(task, tmp_path):
    """Dropout included: the generators' states are part of a checkpoint."""
    arguments = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    arguments["per_device_train_batch_size"] = 2
    uninterrupted = trainer(task, tmp_path, **arguments)
    uninterrupted.train()
    resumed = trainer(task, tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for name, expected in weights(uninterrupted).items():
        assert torch.equal(weights(resumed)[name], expected), name


def test_label_smoothing_and_mixed_precision_train_a_masked_language_model(tmp_path):
    """Smoothing takes the labels away from the model, which then decodes every position."""
    run = trainer("masked_lm", tmp_path, NO_DROPOUT, label_smoothing_factor=0.1, bf16=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
