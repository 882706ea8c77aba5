"""sentence-transformers wraps a saved folder: encoding, saving, loading again."""

import pytest
import torch

from fastbert_hf import FastBertForMaskedLM, FastBertModel
from tests.clients.helpers import FORMS, tiny_model

sentence_transformers = pytest.importorskip("sentence_transformers")

SENTENCES = ["the tree walks left .", "one root", "fast node visits the leaf ?"]


@torch.no_grad()
def mean_of_tokens(model, tokenizer) -> torch.Tensor:
    """Mean of the hidden states of each sentence, encoded alone."""
    hidden = [model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state for sentence in SENTENCES]
    return torch.cat([states.mean(1) for states in hidden])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_class", [FastBertModel, FastBertForMaskedLM])
def test_encode_equals_the_mean_over_tokens(saved, tokenizer, model_class, form):
    model = tiny_model(model_class, **FORMS[form])
    embedder = sentence_transformers.SentenceTransformer(saved(model), device="cpu")
    embeddings = embedder.encode(SENTENCES, convert_to_tensor=True)  # one padded batch
    expected = mean_of_tokens(getattr(model, "fastbert", model), tokenizer)
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)
    assert embedder.max_seq_length == 32


def test_explicit_modules_pool_by_cls(saved, tokenizer):
    model = tiny_model(FastBertModel)
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformer = modules.Transformer(saved(model))
    pooling = modules.Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")
    embedder = sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    with torch.no_grad():
        expected = model(**tokenizer(SENTENCES[0], return_tensors="pt")).last_hidden_state[0, 0]
    embedding = embedder.encode(SENTENCES[0], convert_to_tensor=True)
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)


def test_saving_and_loading_again_gives_the_same_embeddings(saved, tmp_path):
    embedder = sentence_transformers.SentenceTransformer(saved(tiny_model(FastBertModel)), device="cpu")
    folder = tmp_path / "embedder"
    embedder.save(str(folder))
    again = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    given, expected = (e.encode(SENTENCES, convert_to_tensor=True) for e in (again, embedder))
    assert torch.equal(given, expected)
    assert list(folder.rglob("modeling_fastbert.py")), "the saved folder carries the model's code"
