"""Fixtures of the client tests; their plain functions are in helpers.py."""

import pytest
import torch
from transformers import BertTokenizer

from tests.clients.helpers import VOCABULARY


@pytest.fixture(scope="session")
def tokenizer() -> BertTokenizer:
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=32)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Save a model with the tokenizer: saved(model) -> folder."""

    def save(model: torch.nn.Module, name: str = "model") -> str:
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save
