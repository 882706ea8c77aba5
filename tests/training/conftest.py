"""A tiny corpus, tokenizer and model for training tests."""

import random

import pytest
import torch

from fastbert_hf.data.tokenizer import save_tokenizer, train_wordpiece

TINY_MODEL = """
hidden_size: 16
num_hidden_layers: 2
num_attention_heads: 2
max_position_embeddings: 32
fff_depth: 2
classifier_head_dim: null
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with corpus.txt, tokenizer/ and model.yaml."""
    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    words = [
        "river",
        "sea",
        "wind",
        "grass",
        "stone",
        "cloud",
        "flows",
        "turns",
        "sings",
        "under",
        "over",
        "the",
        "a",
        "and",
    ]
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(300)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "model.yaml").write_text(TINY_MODEL, encoding="utf-8")
    save_tokenizer(train_wordpiece(lines, vocab_size=150, model_max_length=32), folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost more than they give at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
