"""Checkpoints and inputs that do not fit end in one error that names what was wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from fastbert_hf import FastBertConfig
from tests.model.test_modeling import build


def change_tensors(folder, drop=(), **extra):
    path = folder / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if name not in drop}
    save_file(tensors | extra, path, metadata={"format": "pt"})


def test_a_saved_head_must_be_whole(tmp_path):
    build(AutoModelForSequenceClassification).save_pretrained(tmp_path)
    change_tensors(tmp_path, drop=["classifier.weight"])
    with pytest.raises(ValueError, match=r"1 missing .*classifier\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    build(AutoModelForSequenceClassification).save_pretrained(tmp_path)
    change_tensors(tmp_path, **{"classifier.junk": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 unexpected .*classifier\.junk"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_an_untied_configuration_needs_a_stored_decoder(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"1 missing .*mlm_head\.decoder\.weight"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_new_head_is_made_on_another_head_s_checkpoint(tmp_path):
    build().save_pretrained(tmp_path)
    for cls in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        assert cls.from_pretrained(tmp_path).classifier.weight.isfinite().all()


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 5), torch.ones(8), torch.ones(2, 8, 5), torch.ones(5, 8), torch.ones(1, 8)],
    ids=lambda m: str(m.shape),
)
def test_masks_of_another_shape_raise(mask):
    with pytest.raises(
        ValueError, match=r"attention_mask of shape \(.*expected \(B, T\) or \(B, T, T\) with B = 2 and T = 8"
    ):
        build()(torch.ones(2, 8).long(), attention_mask=mask)


def test_an_empty_batch_works_with_eager_attention():
    """Transformers' sdpa cannot reshape one."""
    model = build()
    model.set_attn_implementation("eager")
    assert model(torch.ones(0, 8).long()).logits.shape == (0, 8, 61)


def test_an_auto_map_with_tokenizers_is_kept():
    config = FastBertConfig(auto_map={"AutoTokenizer": ["tokenization.Mine", None], "AutoModel": "a/b--modeling.M"})
    assert config.auto_map["AutoTokenizer"] == ["tokenization.Mine", None]
    assert config.auto_map["AutoModel"] == "modeling.M" and "AutoModelForMaskedLM" in config.auto_map
