"""What the pages are tried on: the tiny text, tokenizer and models of the tests of training."""

import gc
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.training.conftest import pretrained, tiny
from tests.training.distillation.conftest import bert, embedder
from tests.training.distillation.runs import distill

__all__ = ["bert", "embedder", "pretrained", "tiny"]


class Made(NamedTuple):
    """Folders and files that are copied to where a page wants them."""

    text: Path  # a text a line
    pretrained: Path  # a FastBERT for masked language modelling
    bert: Path
    embedder: Path  # a BERT as a sentence embedder
    student: Path  # the embedder with leaf trees, as `fastbert distill` leaves it


@pytest.fixture(scope="module")
def made(tiny, pretrained, bert, embedder, tmp_path_factory):
    student = tmp_path_factory.mktemp("student") / "run"
    distill(embedder, tiny / "corpus.txt", student, max_steps=1, fit_steps=1)
    return Made(tiny / "corpus.txt", pretrained, bert, embedder, student)


@pytest.fixture(autouse=True)
def quick_collections():
    """Trainer collects garbage at every end; it need not look at all that was imported until now."""
    gc.freeze()
    yield
    gc.unfreeze()
