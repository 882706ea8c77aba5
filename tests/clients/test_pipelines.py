"""Transformers pipelines open a saved folder and give the numbers of the model itself."""

import pytest
import torch
from transformers import pipeline

from fastbert_hf import (
    FastBertForMaskedLM,
    FastBertForSequenceClassification,
    FastBertForTokenClassification,
    FastBertModel,
)
from tests.clients.helpers import tiny_model

SENTENCES = ["the tree walks left .", "one root"]
LABELS = {"id2label": {0: "leaf", 1: "root", 2: "node"}, "label2id": {"leaf": 0, "root": 1, "node": 2}}


@torch.no_grad()
def test_fill_mask_ranks_tokens_by_the_models_probabilities(saved, tokenizer):
    model = tiny_model(FastBertForMaskedLM)
    fill = pipeline("fill-mask", model=saved(model), top_k=5)
    answers = fill("the [MASK] walks left .")

    inputs = tokenizer("the [MASK] walks left .", return_tensors="pt")
    position = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    best = model(**inputs).logits[0, position].softmax(-1).topk(5)
    assert [answer["token"] for answer in answers] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([answer["score"] for answer in answers]), best.values)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_classification_gives_every_label_its_probability(saved, tokenizer, batch_size):
    model = tiny_model(FastBertForSequenceClassification, num_labels=3, **LABELS)
    classify = pipeline("text-classification", model=saved(model), top_k=None, batch_size=batch_size)
    answers = classify(SENTENCES)

    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    for answer, expected in zip(answers, model(**inputs).logits.softmax(-1), strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert set(scores) == set(LABELS["label2id"])
        given = torch.tensor([scores[label] for label in LABELS["label2id"]])
        torch.testing.assert_close(given, expected)


@torch.no_grad()
def test_token_classification_labels_every_word_piece(saved, tokenizer):
    model = tiny_model(FastBertForTokenClassification, num_labels=3, **LABELS)
    tag = pipeline("token-classification", model=saved(model), ignore_labels=[])
    answers = tag("fastest tree")

    inputs = tokenizer("fastest tree", return_tensors="pt")
    best = model(**inputs).logits[0, 1:-1].softmax(-1).max(-1)  # without [CLS] and [SEP]
    assert [answer["word"] for answer in answers] == tokenizer.tokenize("fastest tree")
    assert [answer["entity"] for answer in answers] == [LABELS["id2label"][i] for i in best.indices.tolist()]
    torch.testing.assert_close(torch.tensor([float(answer["score"]) for answer in answers]), best.values)


@torch.no_grad()
def test_feature_extraction_returns_the_last_hidden_state(saved, tokenizer):
    model = tiny_model(FastBertModel)
    extract = pipeline("feature-extraction", model=saved(model))
    for sentence, features in zip(SENTENCES, extract(SENTENCES), strict=True):
        expected = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(torch.tensor(features), expected)


@torch.no_grad()
def test_feature_extraction_opens_the_folder_of_any_head(saved, tokenizer):
    model = tiny_model(FastBertForMaskedLM)
    extract = pipeline("feature-extraction", model=saved(model))
    expected = model.fastbert(**tokenizer(SENTENCES[0], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.tensor(extract(SENTENCES[0])), expected)


@torch.no_grad()
def test_zero_shot_classification_takes_a_model_with_an_entailment_label(saved, tokenizer):
    labels = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}
    model = tiny_model(FastBertForSequenceClassification, num_labels=2, **labels)
    classify = pipeline("zero-shot-classification", model=saved(model))
    answer = classify(SENTENCES[0], candidate_labels=["leaf", "root"], hypothesis_template="the {} .")

    pairs = [(SENTENCES[0], f"the {word} .") for word in ("leaf", "root")]
    entailment = torch.cat([model(**tokenizer(*pair, return_tensors="pt")).logits[:, 1] for pair in pairs])
    scores = dict(zip(answer["labels"], answer["scores"]))
    torch.testing.assert_close(torch.tensor([scores["leaf"], scores["root"]]), entailment.softmax(0))


def test_pipeline_truncates_to_the_models_positions(saved):
    model = tiny_model(FastBertForSequenceClassification)
    classify = pipeline("text-classification", model=saved(model))
    long_text = "the tree " * 40
    (answer,) = classify(long_text, truncation=True)
    assert 0 < answer["score"] <= 1
    with pytest.raises(ValueError, match="max_position_embeddings"):
        classify(long_text)
