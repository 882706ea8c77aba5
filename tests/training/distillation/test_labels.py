"""Labels beside the teacher: what is read of them, and what is learned."""

import json
import math
import re

import pytest
import torch
from torch import nn

from fastbert_hf.data.masking import IGNORE_INDEX
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.distillation.objective import label_loss
from fastbert_hf.training.distillation.texts import TextBatches
from tests.training.distillation.runs import distill, save_bert


def table(tiny, file, label_of, count=120):
    """Sentences of the tiny corpus, each with the label that a function gives it."""
    lines = list(dict.fromkeys((tiny / "corpus.txt").read_text().splitlines()))[:count]
    file.write_text("".join(json.dumps({"sentence": line, "label": label_of(line)}) + "\n" for line in lines))
    return file


def test_the_loss_on_labels_is_that_of_texts_that_have_one():
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([2, -100, 0, 1])
    known = labels != IGNORE_INDEX
    torch.testing.assert_close(label_loss(logits, labels), nn.functional.cross_entropy(logits[known], labels[known]))
    scores = torch.tensor([0.5, math.nan, -2.0, 1.0])
    errors = (logits[:, 0] - scores)[[0, 2, 3]].square()
    torch.testing.assert_close(label_loss(logits[:, :1], scores), errors.mean())
    for nothing in (torch.full((4,), IGNORE_INDEX), torch.full((4,), math.nan)):
        assert label_loss(logits, nothing) == 0


def test_every_text_keeps_its_label_in_its_batch(tiny):
    tokenizer = load_tokenizer(tiny / "tokenizer")
    texts = [" ".join(["river"] * count) for count in range(1, 13)]
    batches = TextBatches(texts, tokenizer, 32, 4, labels=list(range(1, 13)))
    for number in range(3):
        batch = batches[number]
        assert batch["labels"].dtype == torch.int64
        assert torch.equal(batch["labels"], batch["attention_mask"].sum(1) - 2)  # without [CLS] and [SEP]


@pytest.mark.parametrize("labels", [2, 1], ids=["classes", "scores"])
def test_a_student_learns_from_labels_that_its_teacher_does_not_know(tiny, labels, tmp_path):
    bert = save_bert(tiny, tmp_path / "bert", "ForSequenceClassification", num_labels=labels)
    file = table(tiny, tmp_path / "train.jsonl", lambda line: int("river sea" in line))
    losses = {}
    for weight in (1e-9, 20.0):
        summary = distill(bert, file, tmp_path / str(weight), label_weight=weight, max_steps=60)
        losses[weight] = summary["eval_label_loss"]
    assert losses[20.0] < losses[1e-9]
    assert "loss on the labels" in (tmp_path / "20.0" / "distillation.md").read_text()


def test_labels_are_not_read_without_a_weight(tiny, tmp_path):
    bert = save_bert(tiny, tmp_path / "bert", "ForSequenceClassification", num_labels=2)
    summary = distill(bert, table(tiny, tmp_path / "a.jsonl", lambda line: "unknown"), tmp_path / "out", max_steps=1)
    assert "eval_label_loss" not in summary


@pytest.mark.parametrize(("head", "labels", "label", "message"), [
    ("ForSequenceClassification", 2, 2, "'a.jsonl' has the label '2'; expected one of LABEL_0, LABEL_1, 0, 1"),
    ("ForSequenceClassification", 2, -1, "has the label '-1'"),
    ("ForSequenceClassification", 1, "good", "has a label that is not a number"),
    ("ForSequenceClassification", 2, None, "label_weight is 1, and no row of train_file has a label"),
    ("ForTokenClassification", 2, 0, "label_weight is for classifiers of texts; the model is a FastBertForToken"),
])  # fmt: skip
def test_labels_that_cannot_be_learned_are_named(tiny, head, labels, label, message, tmp_path):
    bert = save_bert(tiny, tmp_path / "bert", head, num_labels=labels)
    with pytest.raises(ValueError, match=re.escape(message)):
        distill(bert, table(tiny, tmp_path / "a.jsonl", lambda line: label), tmp_path / "out", label_weight=1.0)
    assert not (tmp_path / "out").exists()


def test_labels_for_a_model_of_several_a_text_are_refused(tiny, tmp_path):
    kind = "multi_label_classification"
    bert = save_bert(tiny, tmp_path / "bert", "ForSequenceClassification", num_labels=3, problem_type=kind)
    with pytest.raises(ValueError, match=f"label_weight is for one label a text; the model is of {kind}"):
        distill(bert, table(tiny, tmp_path / "a.jsonl", lambda line: 0), tmp_path / "out", label_weight=1.0)
