"""Models of leaf trees, and models saved before there were any."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from fastbert_hf import FastBertForMaskedLM, FastFeedForward, LeafFeedForward
from tests.model.test_modeling import LEAF_TREES, batch, build
from tests.model.test_published_layout import MLM, load


@pytest.mark.parametrize("name", MLM)
@torch.no_grad()
def test_a_config_without_leaf_width_means_the_published_form_bit_for_bit(name, tmp_path):
    """As every config.json saved before leaf trees: the numbers are those of the recorded checkpoint."""
    model, recorded = load(name)
    expected = model(recorded["input_ids"], recorded["attention_mask"]).logits
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("fff_leaf_width", None) is None
    path.write_text(json.dumps(fields))
    assert AutoConfig.from_pretrained(tmp_path).fff_leaf_width is None
    old = FastBertForMaskedLM.from_pretrained(tmp_path).eval()
    assert all(type(layer.ffn) is FastFeedForward for layer in old.fastbert.layers)
    logits = old(recorded["input_ids"], recorded["attention_mask"]).logits
    assert torch.equal(logits, expected)
    torch.testing.assert_close(logits, recorded["logits"], atol=5e-5, rtol=1e-5)


def test_a_new_model_has_random_leaves_and_routers_of_the_inputs_scale():
    model = build(hidden_size=64, fff_depth=6, initializer_range=0.05, **LEAF_TREES)
    assert {name.split(".ffn.")[1] for name in model.state_dict() if ".ffn." in name} == {
        *("router", "threshold", "weight_in", "bias_in", "weight_out", "bias_out")
    }
    for layer in model.fastbert.layers:
        ffn = layer.ffn
        assert type(ffn) is LeafFeedForward and ffn.neurons == model.config.neurons_per_layer == 2 * 64 * 5
        assert ffn.weight_in.std().item() == pytest.approx(0.05, rel=0.05)
        assert ffn.weight_out.std().item() == pytest.approx(0.05, rel=0.05)
        assert ffn.router.std().item() == pytest.approx(4 / 8, rel=0.05)  # logits of standard deviation 4
        assert all((bias == 0).all() for bias in (ffn.threshold, ffn.bias_in, ffn.bias_out))


def test_leaves_without_biases():
    model = build(fff_bias=False, **LEAF_TREES).train()
    model(**batch()).loss.backward()
    names = {name.split(".ffn.")[1] for name, _ in model.named_parameters() if ".ffn." in name}
    assert names == {"router", "threshold", "weight_in", "weight_out"}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_checkpoint_of_one_form_does_not_load_as_the_other(tmp_path):
    for fields, other, message in (
        (LEAF_TREES, {"fff_leaf_width": None}, "unexpected|expected"),
        ({}, LEAF_TREES, "missing|expected"),
        (LEAF_TREES, {"fff_leaf_width": 6}, r"expected \(96, 32\)"),
    ):
        build(**fields).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
        with pytest.raises(ValueError, match=f"ffn.*({message})|({message}).*ffn"):
            AutoModelForMaskedLM.from_pretrained(tmp_path)
