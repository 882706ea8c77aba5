"""Batches of text."""

import pytest
import torch

from fastbert_hf.data.masking import MaskedLanguageModelCollator
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.distillation.texts import MaskedBatches, TextBatches


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
