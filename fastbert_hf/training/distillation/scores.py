"""The user's labelled data: scores of a teacher and of its student, and labels to train on."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert_hf.data.masking import IGNORE_INDEX
from fastbert_hf.data.readers import read_rows, text_of
from fastbert_hf.modeling_fastbert import FastBertForSequenceClassification, FastBertPreTrainedModel
from fastbert_hf.training.distillation.student import encoder_of
from fastbert_hf.training.distillation.teacher import Teacher
from fastbert_hf.training.distillation.texts import LABELS, SCORES, as_device

BATCH = 64


def labelled_rows(file: str) -> tuple[list[tuple[str, ...]], list[Any]]:
    """The texts of each row, one or two, and its label: column `label`, `labels` or `score`.

    Raises:
        ValueError: a column is missing, in the file or in a row.
    """
    rows = read_rows(file)
    label = next((name for name in SCORES if name in rows[0]), None)
    texts = [name for name, value in rows[0].items() if isinstance(value, str) and name not in LABELS]
    if label is None or len(texts) not in (1, 2):
        raise ValueError(
            f"{file!r} has columns {', '.join(map(repr, rows[0]))}; expected one or two of text and one of "
            f"{', '.join(SCORES)}"
        )
    pairs = [
        tuple(text_of(row, name, f"file {file!r}, row {number}") for name in texts)
        for number, row in enumerate(rows, start=1)
    ]
    return pairs, [row.get(label) for row in rows]


def check_labelled(file: str, teacher: Teacher) -> None:
    """Check, before the work, that a file can be scored with a model.

    Raises:
        ValueError: a column is missing, or the model has nothing that such a file measures.
    """
    texts, labels = labelled_rows(file)
    if teacher.embed is not None:
        if len(texts[0]) != 2:
            raise ValueError(f"{file!r} has one text a row; expected pairs, whose similarity is scored")
        _numbers(labels, file)
    elif teacher.model.config.problem_type == "multi_label_classification":
        raise ValueError(f"a model of several labels a text has no score on {file!r}; expected one label a text")
    elif isinstance(teacher.model, FastBertForSequenceClassification):
        _classes(labels, teacher.model, file)
    else:
        raise ValueError(
            f"a {type(teacher.model).__name__} has no score on {file!r}; expected a sentence embedder or a classifier"
        )


def training_labels(teacher: Teacher) -> tuple[Callable[[Any, str], float], float]:
    """How labels of a teacher's task are read, and what stands for none.

    Returns:
        From a label and its file's name, a class id or a number; and `IGNORE_INDEX` or NaN.

    Raises:
        ValueError: the teacher is no classifier of one label a text.
    """
    model = teacher.model
    if not isinstance(model, FastBertForSequenceClassification):
        raise ValueError(f"label_weight is for classifiers of texts; the model is a {type(model).__name__}")
    if model.config.num_labels == 1:
        return lambda value, file: _finite([value], file)[0], math.nan
    if model.config.problem_type not in (None, "single_label_classification"):
        raise ValueError(f"label_weight is for one label a text; the model is of {model.config.problem_type}")
    return lambda value, file: _classes([value], model, file)[0], IGNORE_INDEX


@torch.no_grad()
def score(model: FastBertPreTrainedModel, teacher: Teacher, file: str, length: int) -> float:
    """Score a model on a labelled file.

    Sentence embedders: Spearman's rank correlation of cosine similarity and label. Classifiers: the share of right
    answers; with one output, Spearman's correlation of output and label.

    Args:
        model: the teacher's or the student's. teacher: brings tokenizer and embedding.
        length: longer texts are cut to so many tokens.
    """
    from scipy.stats import spearmanr

    texts, labels = labelled_rows(file)
    model.eval()
    if teacher.embed is not None:
        sides = [_embeddings(model, teacher, [pair[side] for pair in texts], length) for side in (0, 1)]
        similarity = nn.functional.cosine_similarity(*sides)
        return float(spearmanr(similarity.numpy(), _numbers(labels, file))[0])
    device = next(model.parameters()).device
    logits = []
    for start in range(0, len(texts), BATCH):
        columns = [list(column) for column in zip(*texts[start : start + BATCH])]
        batch = teacher.tokenizer(*columns, truncation=True, max_length=length, padding=True, return_tensors="pt")
        logits.append(model(**as_device(batch, device)).logits.float().cpu())
    logits = torch.cat(logits)
    if model.config.num_labels == 1:
        return float(spearmanr(logits[:, 0].numpy(), _numbers(labels, file))[0])
    return (logits.argmax(-1) == torch.tensor(_classes(labels, model, file))).double().mean().item()


def _embeddings(model: nn.Module, teacher: Teacher, texts: Sequence[str], length: int) -> torch.Tensor:
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = [None] * len(texts)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        some = [teacher.prompt + texts[row] for row in rows]
        batch = teacher.tokenizer(some, truncation=True, max_length=length, padding=True, return_tensors="pt")
        batch = as_device(batch, device)
        hidden = encoder_of(model)(**batch).last_hidden_state
        for row, embedding in zip(rows, teacher.embed(hidden, batch["attention_mask"]).float().cpu()):
            found[row] = embedding
    return torch.stack(found)


def _numbers(labels: Sequence[Any], file: str) -> list[float]:
    """Labels that a rank correlation can be had with."""
    values = _finite(labels, file)
    if len(set(values)) < 2:
        raise ValueError(f"{file!r} has the label {values[0]:g} alone; expected different ones, to rank texts by")
    return values


def _finite(labels: Sequence[Any], file: str) -> list[float]:
    try:
        values = [float(label) for label in labels]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file!r} has a label that is not a number: {error}") from error
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{file!r} has a label that is not finite")
    return values


def _classes(labels: Sequence[Any], model: nn.Module, file: str) -> list[int]:
    """Class ids of labels that are ids or names."""
    if model.config.num_labels == 1:
        return [0 for _ in _numbers(labels, file)]
    names = {str(name): number for number, name in model.config.id2label.items()}
    names |= {str(number): number for number in model.config.id2label}
    unknown = sorted({str(label) for label in labels} - names.keys())
    if unknown:
        raise ValueError(f"{Path(file).name!r} has the label {unknown[0]!r}; expected one of {', '.join(names)}")
    return [names[str(label)] for label in labels]
