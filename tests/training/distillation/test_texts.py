"""Texts of files, and batches of them."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastbert_hf.data.masking import MaskedLanguageModelCollator
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.distillation.texts import MaskedBatches, TextBatches, read_texts


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_texts_of_a_long_file_are_a_uniform_sample(suffix, tmp_path):
    texts, file = [f"text {i}" for i in range(400)], tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), file)
    else:
        lines = [json.dumps({"text": text}) for text in texts] if suffix == "jsonl" else texts
        file.write_text("\n".join(["text", *lines] if suffix == "csv" else lines) + "\n")
    counts = [0] * 4
    for seed in range(50):
        chosen = read_texts([str(file)], 40, random.Random(seed))
        assert len(set(chosen)) == 40
        for text in chosen:
            counts[int(text.split()[1]) // 100] += 1
    assert all(abs(count - 500) < 100 for count in counts)  # 4.5 standard deviations


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({}, ["one", "two", "alone"]),
        ({"pairs": True, "singles": False}, [("one", "two"), "alone"]),
        ({"pairs": True}, ["one", "two", ("one", "two"), "alone"]),
    ],
)
def test_a_row_of_two_texts_is_read_as_texts_as_a_pair_or_as_both(tmp_path, kinds, expected):
    rows = [{"a": "one", "b": "two", "label": 1}, {"a": "alone"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_texts([str(tmp_path / "a.jsonl")], 10, random.Random(0), **kinds) == expected


@pytest.mark.parametrize("short", [7, 40])
def test_so_many_of_the_tokens_are_masked_however_much_padding_there_is(tiny, short):
    tokenizer = load_tokenizer(tiny / "tokenizer")
    texts = ["the river"] * short + ["the river flows over a stone and under grass " * 8]
    batches = TextBatches(texts, tokenizer, 64, len(texts))
    plain, masked = batches[0], MaskedBatches(batches, MaskedLanguageModelCollator(tokenizer, 0.15))[0]
    visible = plain["attention_mask"].bool()
    assert (~visible).sum() > visible.sum()
    assert masked["masked"].sum() == round(0.15 * int(visible.sum()))
    special = torch.isin(plain["input_ids"], torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]))
    assert not (masked["masked"] & (special | ~visible)).any()
    assert torch.equal(masked["input_ids"][~masked["masked"]], plain["input_ids"][~masked["masked"]])
    assert (masked["input_ids"][masked["masked"]] == tokenizer.mask_token_id).any()


@pytest.mark.parametrize(("pairs", "calls"), [(10, 1), (0, 1), (4, 2)])
def test_texts_and_pairs_are_tokenized_together_and_as_one_by_one(tiny, monkeypatch, pairs, calls):
    tokenizer = load_tokenizer(tiny / "tokenizer")
    words = (tiny / "corpus.txt").read_text().splitlines()
    texts = [(words[i], words[i + 20]) if i % 5 < pairs / 2 else words[i] for i in range(10)]
    assert sum(isinstance(text, tuple) for text in texts) == pairs
    options = {"truncation": True, "max_length": 12}
    expected = [tokenizer(*((text,) if isinstance(text, str) else text), **options) for text in texts]
    made, call = [], type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kwargs: made.append(1) or call(*args, **kwargs))
    batches = TextBatches(texts, tokenizer, 12, 1)
    assert len(made) == calls
    found = [batches[number] for number in range(10)]
    for name in ("input_ids", "token_type_ids"):
        assert sorted(batch[name][0].tolist() for batch in found) == sorted(single[name] for single in expected)
