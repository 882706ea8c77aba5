"""A tiny corpus, tokenizer and model for training tests."""

import json
import random

import pytest
import torch
from transformers import AutoModelForMaskedLM

from fastbert_hf.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece
from fastbert_hf.recipes import load_yaml
from fastbert_hf.training.glue import finetuning
from fastbert_hf.training.pretraining.model import model_config

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


@pytest.fixture(scope="session")
def pretrained(tiny):
    """A folder with random weights and the tokenizer."""
    tokenizer = load_tokenizer(tiny / "tokenizer")
    torch.manual_seed(0)
    config = model_config({**load_yaml(tiny / "model.yaml"), "classifier_pooling": "mean"}, tokenizer, 32)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tiny / "pretrained")
    tokenizer.save_pretrained(tiny / "pretrained")
    return tiny / "pretrained"


def write_split(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory):
    """Three tasks whose answer is one word of the text."""
    folder = tmp_path_factory.mktemp("glue")
    draw = random.Random(1)

    def text(key):
        words = draw.choices(["river", "wind", "the", "a", "flows"], k=5)
        return " ".join([*words, key])

    for split, count in (("train", 120), ("validation", 40)):
        labels = [draw.randrange(2) for _ in range(count)]
        rows = [{"sentence": text("grass" if label else "stone"), "label": label} for label in labels]
        write_split(folder / "sst2" / f"{split}.jsonl", rows)
        rows = [
            {"sentence1": text("sea"), "sentence2": text("cloud" if label else "stone"), "label": 4.0 * label + 0.5}
            for label in labels
        ]
        write_split(folder / "stsb" / f"{split}.jsonl", rows)
    for split in ("train", "validation_matched", "validation_mismatched"):
        rows = [{"premise": text("sea"), "hypothesis": text("sea"), "label": row % 3} for row in range(12)]
        write_split(folder / "mnli" / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost more than they give at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def counted(monkeypatch):
    """Names the runs that were really trained."""
    started, original = [], finetuning.train

    def train(trainer, checkpoint):
        started.append(trainer.args.output_dir)
        return original(trainer, checkpoint)

    monkeypatch.setattr(finetuning, "train", train)
    return started
