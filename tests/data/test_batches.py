"""Packing documents and masking batches."""

import numpy as np
import pytest
import torch

from fastbert_hf.data.build_corpus import CorpusSettings, build_corpus
from fastbert_hf.data.masking import IGNORE_INDEX, MaskedLanguageModelCollator, MaskedSequences
from fastbert_hf.data.packing import Packer, tokenize_documents
from fastbert_hf.data.sources import LocalFile
from fastbert_hf.data.tokenizer import train_wordpiece

TEXT = [f"river {number} flows to the sea and the wind turns {number * 7}" for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXT, vocab_size=150)


def packed(documents, tokenizer, seq_length):
    """Rows as a data set gives them."""
    arrays = Packer(tokenizer, seq_length).pack(tokenize_documents(documents, tokenizer))
    return [{"input_ids": torch.from_numpy(row.astype(np.int64))} for array in arrays for row in array]


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return packed(TEXT, tokenizer, 32)


def test_packing_keeps_every_token_in_order(tokenizer, sequences):
    stream = [token for text in TEXT for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], 3]]
    rows = torch.stack([row["input_ids"] for row in sequences])
    assert rows.shape == (len(stream) // 31, 32)
    assert (rows[:, 0] == tokenizer.cls_token_id).all()
    assert rows[:, 1:].reshape(-1).tolist() == stream[: rows.shape[0] * 31]
    assert tokenizer.pad_token_id not in rows


def test_packing_rejects_empty_text_and_short_sequences(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="corpus is empty"):
        build_corpus([LocalFile(tmp_path / "empty.txt")], [], CorpusSettings(32, vocab_size=150), tmp_path / "out")
    with pytest.raises(ValueError, match="at least 8"):
        packed(TEXT, tokenizer, 4)
    assert packed([], tokenizer, 32) == packed(["river"], tokenizer, 32) == []


@pytest.mark.parametrize("probability", [0.15, 0.25, 0.4])
def test_every_batch_masks_exactly_the_same_number(tokenizer, sequences, probability):
    collator = MaskedLanguageModelCollator(tokenizer, probability, seed=3)
    for start in range(0, len(sequences) - 6, 6):
        batch = collator([sequences[start + row] for row in range(6)])
        assert int((batch["labels"] != IGNORE_INDEX).sum()) == round(probability * 6 * 32)


def test_masking_follows_the_80_10_10_rule(tokenizer, sequences):
    rows = [sequences[row] for row in range(40)]
    original = torch.stack([row["input_ids"] for row in rows])
    batch = MaskedLanguageModelCollator(tokenizer, 0.25)(rows)
    chosen = batch["labels"] != IGNORE_INDEX
    count = round(0.25 * original.numel())
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert int((batch["input_ids"][chosen] == tokenizer.mask_token_id).sum()) == round(0.8 * count)
    changed = (batch["input_ids"] != original) & (batch["input_ids"] != tokenizer.mask_token_id)
    assert 0.8 * round(0.1 * count) <= int(changed.sum()) <= round(0.1 * count)  # a draw can hit the same token
    assert not torch.isin(batch["input_ids"][changed], torch.tensor([0, 2, 3, 4])).any()
    assert not torch.isin(batch["labels"][chosen], torch.tensor([0, 2, 3, 4])).any()


def test_masks_depend_on_seed_and_content_only(tokenizer, sequences):
    rows = [sequences[row] for row in range(4)]
    first = MaskedLanguageModelCollator(tokenizer, seed=1)
    first([sequences[9]])
    torch.manual_seed(5)
    assert torch.equal(first(rows)["labels"], MaskedLanguageModelCollator(tokenizer, seed=1)(rows)["labels"])
    other_seed = MaskedLanguageModelCollator(tokenizer, seed=2)(rows)["labels"]
    other_order = first(rows[::-1])["labels"].flip(0)
    assert not torch.equal(first(rows)["labels"], other_seed)
    assert not torch.equal(first(rows)["labels"], other_order)


def test_held_out_masks_are_fixed_and_equal_in_number(tokenizer, sequences):
    collator = MaskedLanguageModelCollator(tokenizer, 0.25)
    held = MaskedSequences(sequences, collator)
    assert len(held) == len(sequences)
    assert ((held.labels != IGNORE_INDEX).sum(1) == 8).all()
    batch = collator([held[0], held[1]])  # carries labels already: not masked again
    assert torch.equal(batch["input_ids"], held.input_ids[:2]) and torch.equal(batch["labels"], held.labels[:2])


def test_unknown_words_can_be_masked_but_separators_cannot(tokenizer):
    snow = packed(["☃ ☃ ☃ ☃ ☃ ☃ ☃ ☃ ☃"], tokenizer, 8)
    batch = MaskedLanguageModelCollator(tokenizer, 0.5)([snow[0]])
    assert int((batch["labels"] == tokenizer.unk_token_id).sum()) == 4
    separators = {"input_ids": torch.full((8,), tokenizer.sep_token_id)}
    with pytest.raises(ValueError, match="cannot mask 4 positions"):
        MaskedLanguageModelCollator(tokenizer, 0.5)([separators])


def test_bad_probability_and_missing_mask_token_raise(tokenizer):
    for probability in (0.0, 1.0):
        with pytest.raises(ValueError, match="mlm_probability"):
            MaskedLanguageModelCollator(tokenizer, probability)
    maskless = train_wordpiece(TEXT, vocab_size=150)
    maskless.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLanguageModelCollator(maskless)
