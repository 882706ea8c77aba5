"""Text for distillation: read from the user's files, tokenized once, served in batches of texts of like length."""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fastbert_hf.data.masking import IGNORE_INDEX, MaskedLanguageModelCollator
from fastbert_hf.data.readers import TABLE_SUFFIXES, check_corpus_files, iter_rows, read_documents

BATCH = 32  # texts that a model reads at a time where nothing else is said
SCORES = ("label", "score", "labels")  # columns of tables that hold labels, the first that is there
LABELS = (*SCORES, "idx", "id")  # columns that are not text
KEPT = ("input_ids", "attention_mask", "token_type_ids")
NOT_INPUTS = ("labels", "masked")  # entries of batches that no model takes

Text = str | tuple[str, str]
Item = TypeVar("Item")


def check_text_files(files: Iterable[str]) -> None:
    """Check that every file exists and has a known type.

    Raises:
        ValueError: naming the file.
    """
    for file in files:
        if Path(file).suffix not in TABLE_SUFFIXES:
            check_corpus_files([file])
        elif not Path(file).is_file():
            raise ValueError(f"data file {file!r} does not exist")


def read_texts(
    files: Sequence[str], count: int, draw: random.Random, pairs: bool = False, singles: bool = True
) -> list[Text]:
    """Texts of several files: of each, `count` at random (of a text file, among its first 20 * count lines).

    Args:
        files: tables, of which every string is a text, and text files with one text a line.
        count: for each file, at most.
        draw: what chooses.
        pairs: a row of a table that has two texts gives them as a pair.
        singles: it gives each of them as a text.
    """
    return [text for text, _ in read_examples(files, count, draw, pairs, singles)]


def read_examples(
    files: Sequence[str],
    count: int,
    draw: random.Random,
    pairs: bool = False,
    singles: bool = True,
    label_of: Callable[[Any, str], float | None] = lambda value, file: None,
) -> list[tuple[Text, float | None]]:
    """The texts of `read_texts`, each with its label; None where there is none.

    Args:
        label_of: makes a label of what a row has in the first of the columns `SCORES`, and of the file's name.
    """
    examples: list[tuple[Text, float | None]] = []
    for file in files:
        if Path(file).suffix in TABLE_SUFFIXES:
            found = itertools.chain.from_iterable(_row_examples(row, pairs, singles) for row in iter_rows(file))
        else:
            found = ((text, None) for text in itertools.islice(read_documents([file]), 20 * count))
        sample = _sample(found, count, draw)
        examples += [(text, None if value in (None, "") else label_of(value, file)) for text, value in sample]
    return examples


def _sample(items: Iterable[Item], count: int, draw: random.Random) -> list[Item]:
    """At most `count` of the items, uniformly; no more are in memory (reservoir sampling, algorithm R)."""
    kept: list[Item] = []
    for number, item in enumerate(items):
        if number < count:
            kept.append(item)
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = item
    return kept


def _row_examples(row: dict, pairs: bool, singles: bool) -> list[tuple[Text, Any]]:
    """The texts of a row, with its label where it has one text, or a pair and nothing else is asked for."""
    values = [value for name, value in row.items() if isinstance(value, str) and value and name not in LABELS]
    texts: list[Text] = list(values)
    if pairs and len(values) == 2:
        texts = [*(values if singles else ()), tuple(values)]
    label = next((row[name] for name in SCORES if name in row), None)
    return [(text, label if len(texts) == 1 else None) for text in texts]


def tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Iterable[dict]:
    """Batches of texts of like length: `input_ids` and `attention_mask` (B, T)."""
    texts = sorted(texts, key=len)
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        yield tokenizer(part, truncation=True, max_length=max_seq_length, padding=True, return_tensors="pt")


class TextBatches(Dataset):
    """Tokenized texts in batches of like length, in an order that a seed decides.

    Args:
        texts: texts, or pairs of texts.
        tokenizer: what makes ids of them.
        max_seq_length: longer texts are cut.
        batch_size: texts a batch; what is left over in the end is not used.
        seed: for the batches' composition and order.
        labels: one for each text.

    Raises:
        ValueError: fewer texts than one batch.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        batch_size: int,
        seed: int = 0,
        labels: Sequence[float] | None = None,
    ):
        if len(texts) < batch_size:
            raise ValueError(
                f"the text holds {len(texts)} different texts; expected at least one batch, {batch_size}: give more "
                "text, or a smaller batch_size"
            )
        self.tokenizer = tokenizer
        self._labels = None if labels is None else torch.tensor(labels)
        self._names = [name for name in KEPT if name in tokenizer.model_input_names and name != "attention_mask"]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self._names}
        lengths = []
        for start in range(0, len(texts), 1000):
            some = texts[start : start + 1000]
            encoded = _encode(tokenizer, some, max_seq_length)
            lengths += map(len, encoded["input_ids"])
            for name in self._names:  # few bytes an id: lists of Python's integers are ten times as large
                parts[name].append(np.fromiter(itertools.chain.from_iterable(encoded[name]), dtype=np.int32))
        self._flat = {name: np.concatenate(part) for name, part in parts.items()}
        self._ends = np.cumsum(lengths)
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(texts))
        order = order[np.argsort(np.asarray(lengths)[order], kind="stable")]
        count = len(texts) // batch_size
        left_out = len(texts) - count * batch_size
        order = np.delete(order, draw.choice(len(texts), left_out, replace=False))
        self._batches = order.reshape(count, batch_size)[draw.permutation(count)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A batch: input_ids, attention_mask and, where the tokenizer makes them, token_type_ids, (B, T) int64.

        With labels, also `labels` (B,), int64 or float32.
        """
        rows = [slice(self._ends[i - 1] if i else 0, self._ends[i]) for i in self._batches[index]]
        encoded = {name: [flat[row].tolist() for row in rows] for name, flat in self._flat.items()}
        batch = dict(self.tokenizer.pad(encoded, return_attention_mask=True, return_tensors="pt"))
        return batch if self._labels is None else {**batch, "labels": self._labels[self._batches[index]]}


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_seq_length: int) -> dict[str, list]:
    """What a tokenizer makes of texts and pairs, in their order: all texts in one call, and all pairs."""
    options = {"truncation": True, "max_length": max_seq_length}
    single = [number for number, text in enumerate(texts) if isinstance(text, str)]
    paired = [number for number, text in enumerate(texts) if not isinstance(text, str)]
    parts = []
    if single:
        parts.append(tokenizer([texts[number] for number in single], **options))
    if paired:
        parts.append(tokenizer(*map(list, zip(*(texts[number] for number in paired))), **options))
    order = np.argsort(single + paired)
    joined = {name: list(itertools.chain.from_iterable(part[name] for part in parts)) for name in parts[0]}
    return {name: [values[place] for place in order] for name, values in joined.items()}


class MaskedBatches(Dataset):
    """Batches with a part of their tokens masked, padding aside; the same ones each time a batch is taken.

    Args:
        batches: of `TextBatches`. collator: what masks.
    """

    def __init__(self, batches: TextBatches, collator: MaskedLanguageModelCollator):
        self.batches, self.collator = batches, collator

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A batch and `masked` (B, T), where a token was masked."""
        batch = self.batches[index]
        visible = batch["attention_mask"].bool()
        found = self.collator.mask(batch["input_ids"][visible].unsqueeze(0))  # (1, N)
        input_ids, masked = batch["input_ids"].clone(), torch.zeros_like(visible)
        input_ids[visible], masked[visible] = found["input_ids"][0], found["labels"][0] != IGNORE_INDEX
        return {**batch, "input_ids": input_ids, "masked": masked}


def first_item(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The collator of data whose items are batches already."""
    return items[0]


def split_texts(texts: Iterable[Text], held_out: int, draw: random.Random) -> tuple[list[Text], list[Text]]:
    """Different texts, shuffled: those to train on, and at most `held_out` (and a tenth) others."""
    different = list(dict.fromkeys(text for text in texts if "".join(text).strip()))
    draw.shuffle(different)
    count = min(held_out, len(different) // 10)
    return different[count:], different[:count]


def as_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def in_time(batches: Iterable[dict[str, Tensor]], seconds: float) -> Iterator[dict[str, Tensor]]:
    """The first batch, and more until so many seconds are over since it was taken."""
    end = time.perf_counter() + seconds
    for batch in batches:
        yield batch
        if time.perf_counter() >= end:
            return


def in_turn(batches: Dataset, device: torch.device, tokens: int) -> Iterator[dict[str, Tensor]]:
    """The inputs of batches, one after the other, until they hold so many tokens that are not padding."""
    seen = 0
    for number in range(len(batches)):
        if seen >= tokens:
            return
        batch = as_device(batches[number], device)
        seen += int(batch["attention_mask"].sum())
        yield {name: value for name, value in batch.items() if name not in NOT_INPUTS}
