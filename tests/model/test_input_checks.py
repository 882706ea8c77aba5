"""Labels, positions and ids that do not fit: one ValueError that names what was given and what was expected."""

import re

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests.model.test_modeling import BERT_GEOMETRY, build

IDS = torch.ones(3, 8).long()
CHOICES = torch.ones(3, 2, 8).long()


def zeros(*shape, dtype=torch.long):
    return torch.zeros(shape, dtype=dtype)


# head, fields, labels of a wrong shape, the shape that is expected; three rows of eight tokens
WRONG_LABELS = [
    (AutoModelForMaskedLM, {}, {"labels": zeros(3)}, "(3, 8), (B, T)"),
    (AutoModelForMaskedLM, {}, {"labels": zeros(3, 5)}, "(3, 8), (B, T)"),
    (AutoModelForMaskedLM, {}, {"labels": zeros(3, 9)}, "(3, 8), (B, T)"),
    (AutoModelForMaskedLM, {}, {"labels": zeros(8, 3)}, "(3, 8), (B, T)"),
    (AutoModelForTokenClassification, {}, {"labels": zeros(8, 3)}, "(3, 8), (B, T)"),
    (AutoModelForTokenClassification, {}, {"labels": zeros(3)}, "(3, 8), (B, T)"),
    (AutoModelForSequenceClassification, {}, {"labels": zeros(4)}, "(3,) or (3, 1), (B,)"),
    (AutoModelForSequenceClassification, {"num_labels": 3}, {"labels": zeros(3, 3)}, "(3,) or (3, 1), (B,)"),
    (
        AutoModelForSequenceClassification,
        {"num_labels": 3},
        {"labels": zeros(3, dtype=torch.float)},
        "(3, 3), (B, num_labels)",
    ),
    # mean squared errors would broadcast these
    (
        AutoModelForSequenceClassification,
        {"num_labels": 1},
        {"labels": zeros(1, dtype=torch.float)},
        "(3,) or (3, 1)",
    ),
    (AutoModelForSequenceClassification, {"num_labels": 1}, {"labels": zeros(2, 3)}, "(3,) or (3, 1)"),
    (
        AutoModelForSequenceClassification,
        {"num_labels": 3, "problem_type": "regression"},
        {"labels": zeros(3, dtype=torch.float)},
        "(3, 3), (B, num_labels)",
    ),
    (
        AutoModelForQuestionAnswering,
        {},
        {"start_positions": zeros(2), "end_positions": zeros(3)},
        "(3,) or (3, 1), (B,)",
    ),
    (
        AutoModelForQuestionAnswering,
        {},
        {"start_positions": zeros(3), "end_positions": zeros(3, 2)},
        "(3,) or (3, 1), (B,)",
    ),
    (AutoModelForMultipleChoice, {}, {"labels": zeros(2)}, "(3,), (B,)"),
    (AutoModelForMultipleChoice, {}, {"labels": zeros(3, 2, dtype=torch.float)}, "(3,), (B,)"),
]


def label_message(labels, expected):
    name, shape = (
        next((name, tuple(value.shape)) for name, value in labels.items() if tuple(value.shape) not in ((3,), (3, 1)))
        if "start_positions" in labels
        else ("labels", tuple(labels["labels"].shape))
    )
    return re.escape(f"{name} of shape {shape}; expected {expected}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("sparse_prediction", [0.25, 0.0])
@pytest.mark.parametrize(("auto_class", "fields", "labels", "expected"), WRONG_LABELS)
def test_labels_of_a_wrong_shape_raise(auto_class, fields, labels, expected, sparse_prediction, training):
    model = build(auto_class, sparse_prediction=sparse_prediction, **fields).train(training)
    ids = CHOICES if auto_class is AutoModelForMultipleChoice else IDS
    with pytest.raises(ValueError, match=label_message(labels, expected)):
        model(ids, **labels)


@pytest.mark.parametrize(
    ("auto_class", "fields", "labels", "expected"), {case[0]: case for case in WRONG_LABELS}.values()
)
def test_labels_of_a_wrong_shape_raise_in_a_compiled_model(auto_class, fields, labels, expected):
    torch._dynamo.reset()
    model = build(auto_class, sparse_prediction=0.25, num_hidden_layers=0, **fields).train()
    ids = CHOICES if auto_class is AutoModelForMultipleChoice else IDS
    message = label_message(labels, expected)
    with pytest.raises(ValueError, match=message):
        torch.compile(model, backend="eager")(ids, **labels)
    # a model that may not fall back to eager cannot raise errors of its own: the compiler quotes them, torch 2.9 as
    # ValueError([ConstantVariable(str: '...
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=rf"ValueError\((\[ConstantVariable\(str: )?.{message}"):
        torch.compile(model, backend="eager", fullgraph=True)(ids, **labels)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("auto_class", "fields", "inputs", "message"),
    [
        (AutoModelForMaskedLM, {}, {"labels": IDS * 61}, "labels[0, 0] is 61; expected 0 to 60, or -100 (vocab_size"),
        (
            AutoModelForTokenClassification,
            {"num_labels": 2},
            {"labels": torch.tensor([[-100, 1, 0, 1, -1, 0, 0, 9]] * 3)},
            "labels[0, 4] is -1; expected 0 to 1, or -100 (num_labels is 2)",
        ),
        (
            AutoModelForSequenceClassification,
            {"num_labels": 3},
            {"labels": torch.tensor([0, 1, 3])},
            "labels[2] is 3; expected 0 to 2, or -100 (num_labels is 3)",
        ),
        (
            AutoModelForMultipleChoice,
            {},
            {"labels": torch.tensor([0, 2, 1])},
            "labels[1] is 2; expected 0 to 1, or -100 (the number of choices is 2)",
        ),
    ],
)
def test_labels_that_are_no_class_are_named(auto_class, fields, inputs, message):
    ids = CHOICES if auto_class is AutoModelForMultipleChoice else IDS
    with pytest.raises(ValueError, match=re.escape(message)):
        build(auto_class, sparse_prediction=0.25, **fields).train()(ids, **inputs)


def with_value(value):
    ids = torch.zeros(3, 8, dtype=torch.long)
    ids[1, 5] = value
    return ids


@pytest.mark.parametrize("geometry", [{}, BERT_GEOMETRY], ids=["crammed", "bert"])
@pytest.mark.parametrize("value", [-1, 99])
def test_ids_out_of_range_are_named_with_their_place_and_the_size(geometry, value):
    model = build(**geometry)
    with pytest.raises(ValueError, match=rf"^input_ids\[1, 5\] is {value}; expected 0 to 60 \(vocab_size is 61\)$"):
        model(with_value(value))
    message = rf"^position_ids\[1, 5\] is {value}; expected 0 to 15 \(max_position_embeddings is 16\)$"
    with pytest.raises(ValueError, match=message):
        model(IDS, position_ids=with_value(value))
    with pytest.raises(ValueError, match=message.replace("1, 5", "3")):
        model(IDS, position_ids=torch.tensor([0, 1, 2, value, 4, 5, 6, 7]))
    if geometry:
        with pytest.raises(
            ValueError, match=rf"^token_type_ids\[1, 5\] is {value}; expected 0 to 1 \(type_vocab_size"
        ):
            model(IDS, token_type_ids=with_value(value))


def test_the_size_that_is_named_is_that_of_a_resized_table():
    model = build()
    model.resize_token_embeddings(70)
    assert model(with_value(69)).logits.shape == (3, 8, 70)
    with pytest.raises(ValueError, match=r"expected 0 to 69 \(vocab_size is 70\)"):
        model(with_value(70))


@pytest.mark.parametrize("geometry", [{}, BERT_GEOMETRY], ids=["crammed", "bert"])
def test_inputs_that_would_be_broadcast_raise(geometry):
    model = build(AutoModel, **geometry)
    expected = model(IDS).last_hidden_state
    for positions in (torch.arange(8), torch.arange(8)[None], torch.arange(8).expand(3, -1)):
        assert torch.equal(model(IDS, position_ids=positions).last_hidden_state, expected)
    for shape in ((2, 8), (3, 1), (1,), (3, 1, 8), ()):
        with pytest.raises(ValueError, match=re.escape(f"position_ids of shape {shape}; expected (8,) or (3, 8)")):
            model(IDS, position_ids=zeros(*shape))
    with pytest.raises(ValueError, match=r"position_ids of shape \(3, 8\); expected \(8,\) or \(1, 8\)"):
        model(IDS[:1], position_ids=zeros(3, 8))
    if geometry:
        with pytest.raises(ValueError, match=r"token_type_ids of shape \(3, 8\); expected \(8,\) or \(1, 8\)"):
            model(IDS[:1], token_type_ids=zeros(3, 8))


def test_ids_and_embeddings_of_a_wrong_shape_raise():
    model = build(AutoModel)
    with pytest.raises(ValueError, match=r"input_ids of shape \(8,\) and torch.int64; expected \(B, T\), integers"):
        model(zeros(8))
    with pytest.raises(ValueError, match=r"input_ids of shape \(3, 8\) and torch.float32; expected"):
        model(IDS.float())
    with pytest.raises(ValueError, match=r"inputs_embeds of shape \(3, 8, 31\); expected \(B, T, H\) with H = 32"):
        model(inputs_embeds=torch.zeros(3, 8, 31))
    with pytest.raises(ValueError, match=r"inputs_embeds of shape \(8, 32\); expected"):
        model(inputs_embeds=torch.zeros(8, 32))


@pytest.mark.parametrize("geometry", [{}, BERT_GEOMETRY], ids=["crammed", "bert"])
def test_checks_never_read_data(geometry):
    """On the meta device there is none: a check that asked for a value, as one that waits for a GPU, would raise."""
    model = build(sparse_prediction=0.0, **geometry).to("meta").train()
    ids = torch.ones(3, 8, dtype=torch.long, device="meta")
    outputs = model(ids, token_type_ids=ids, position_ids=ids, labels=ids)
    assert outputs.logits.shape == (3, 8, 61) and outputs.loss.shape == ()


def test_checks_leave_one_graph():
    torch._dynamo.reset()
    model = build(num_hidden_layers=1, sparse_prediction=0.0, **BERT_GEOMETRY).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for positions in (torch.arange(8), torch.arange(8).expand(3, -1)):
        outputs = compiled(IDS, IDS, token_type_ids=IDS, position_ids=positions, labels=IDS)
        assert outputs.loss.isfinite()
    torch._dynamo.reset()
