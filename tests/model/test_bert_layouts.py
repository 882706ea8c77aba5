"""Checkpoints of BERT, RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT load as FastBERT and compute what they did."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.export import Dim
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

import fastbert_hf
from fastbert_hf import (
    FastBertConfig,
    FastBertForMaskedLM,
    FastBertModel,
)
from tests.clients.helpers import run_without_package

PAD, TOKENS, POSITIONS = 1, 12, 20
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
}
DISTIL_SIZES = {
    **{key: SIZES[key] for key in ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id")},
    **{"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
}
FAMILIES = {
    "Bert": SIZES,
    "Roberta": SIZES | {"type_vocab_size": 1},
    "XLMRoberta": SIZES | {"type_vocab_size": 1},
    "Camembert": SIZES | {"type_vocab_size": 1},
    "DistilBert": DISTIL_SIZES,
}
HEADS = ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
HEADS += ["ForMultipleChoice"]
MINILM = os.environ.get("FASTBERT_MINILM")


def make(family, head="Model", seed=0, **changes):
    """A random model of the family with no parameter at a value that hides a mistake, such as a zero bias."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family] | {"num_labels": 3} | changes)
    if head == "ForQuestionAnswering":
        config.num_labels = 2
    model = getattr(transformers, family + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(family, padding="right", head="Model"):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(PAD + 1, SIZES["vocab_size"], (4, TOKENS), generator=generator)
    mask = torch.ones_like(input_ids)
    for row, length in enumerate((TOKENS, 5, 9, 1)):
        mask[row, slice(length, None) if padding == "right" else slice(0, TOKENS - length)] = 0
    inputs = {"input_ids": input_ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    if family == "Bert":
        inputs["token_type_ids"] = torch.randint(2, (4, TOKENS), generator=generator) * mask
    if head == "ForMultipleChoice":
        inputs = {name: value.unflatten(0, (2, 2)) for name, value in inputs.items()}  # (B, choices, T)
    return inputs


def labels_for(head):
    if head == "ForQuestionAnswering":
        return {"start_positions": torch.tensor([0, 1, 2, 0]), "end_positions": torch.tensor([3, 1, 4, 0])}
    if head == "ForMultipleChoice":
        return {"labels": torch.tensor([1, 0])}
    if head == "ForSequenceClassification":
        return {"labels": torch.tensor([2, 0, 1, 1])}
    labels = torch.arange(4 * TOKENS).view(4, TOKENS) % 3
    return {"labels": labels.masked_fill(labels == 0, -100)}


def ours(head):
    return getattr(fastbert_hf, f"FastBert{head}")


def outputs_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs, output_hidden_states=True)


def assert_same(actual, expected):
    """Losses, logits and hidden states, the last of which every model ends with."""
    for name, value in expected.items():
        if name in ("hidden_states", "pooler_output"):
            continue
        tolerance = 1e-5 if name == "last_hidden_state" else 2e-5
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert len(actual.hidden_states) == len(expected.hidden_states)
    for first, second in zip(actual.hidden_states, expected.hidden_states):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def assert_same_parameters(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_encoder_computes_what_it_did_and_is_saved_as_our_own(tmp_path, family):
    original = make(family)
    original.save_pretrained(tmp_path / "original")
    with CaptureLogger(logging.get_logger("transformers")) as captured:
        model = FastBertModel.from_pretrained(tmp_path / "original")
    assert captured.out == ""
    assert type(model.config) is FastBertConfig and model.config.ffn_type == "dense"
    for padding in ("right", "left"):
        inputs = batch(family, padding)
        assert_same(outputs_of(model, inputs), outputs_of(original, inputs))
        assert_same(
            outputs_of(model, {"input_ids": inputs["input_ids"]}),
            outputs_of(original, {"input_ids": inputs["input_ids"]}),
        )
    embeds = {"inputs_embeds": torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))}
    assert_same(outputs_of(model, embeds), outputs_of(original, embeds))
    model.save_pretrained(tmp_path / "native")
    assert json.loads((tmp_path / "native" / "config.json").read_text())["model_type"] == "fastbert"
    assert set(load_file(tmp_path / "native" / "model.safetensors")) == set(model.state_dict())
    again = FastBertModel.from_pretrained(tmp_path / "native")
    assert_same_parameters(again, model)
    assert_same(outputs_of(again, inputs), outputs_of(original, inputs))


def test_a_bert_with_a_language_model_head_keeps_it(tmp_path):
    original = make("Bert", "LMHeadModel")
    original.save_pretrained(tmp_path)
    config = FastBertConfig.from_pretrained(tmp_path)
    assert config.architectures == ["FastBertForMaskedLM"]
    inputs = batch("Bert", "right")
    assert_same(outputs_of(ours("ForMaskedLM").from_pretrained(tmp_path), inputs), outputs_of(original, inputs))


def heads_of_families():
    for family in FAMILIES:
        for head in HEADS:
            lacks = family in ("XLMRoberta", "Camembert") and head == "ForMultipleChoice"
            lacks = lacks and make(family, head).roberta.pooler is None  # it fails when it is called
            skip = pytest.mark.skipif(
                lacks, reason="this version of Transformers builds this class without its pooler"
            )
            yield pytest.param(family, head, marks=skip)


@pytest.mark.parametrize(("family", "head"), heads_of_families())
def test_every_head_gives_the_logits_and_the_loss_that_it_gave(tmp_path, family, head):
    original = make(family, head)
    original.save_pretrained(tmp_path / "original")
    model = ours(head).from_pretrained(tmp_path / "original")
    assert model.config.architectures == [type(model).__name__]
    for padding in ("right", "left"):
        inputs = batch(family, padding, head) | labels_for(head)
        expected = outputs_of(original, inputs)
        assert expected.loss.isfinite()
        assert_same(outputs_of(model, inputs), expected)
    model.save_pretrained(tmp_path / "native")
    again = ours(head).from_pretrained(tmp_path / "native")
    assert_same_parameters(again, model)
    assert_same(outputs_of(again, inputs), expected)
    assert_same_parameters(FastBertModel.from_pretrained(tmp_path / "original"), model.fastbert)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_activations_are_known_by_their_names(tmp_path, family, name):
    """RoBERTa's MLM head has an exact GELU whatever its layers have."""
    original = make(family, "ForMaskedLM", **{"activation" if family == "DistilBert" else "hidden_act": name})
    original.save_pretrained(tmp_path)
    inputs = batch(family)
    assert_same(outputs_of(FastBertForMaskedLM.from_pretrained(tmp_path), inputs), outputs_of(original, inputs))


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_an_untied_decoder_stays_its_own(tmp_path, family):
    original = make(family, "ForMaskedLM", tie_word_embeddings=False)
    original.save_pretrained(tmp_path)
    model = FastBertForMaskedLM.from_pretrained(tmp_path)
    assert model.mlm_head.decoder.weight is not model.fastbert.embeddings.word_embeddings.weight
    assert_same(outputs_of(model, batch(family)), outputs_of(original, batch(family)))


def test_positions_end_where_the_table_does(tmp_path):
    longest = {"Bert": POSITIONS, "Roberta": POSITIONS - PAD - 1}
    for family, tokens in longest.items():
        original = make(family)
        original.save_pretrained(tmp_path / family)
        model = FastBertModel.from_pretrained(tmp_path / family)
        assert model.config.longest_sequence == tokens
        full = {"input_ids": torch.full((1, tokens), 7)}
        assert_same(outputs_of(model, full), outputs_of(original, full))
        with pytest.raises(
            ValueError, match=rf"{tokens + 1} tokens; this model has positions for {tokens} \(max_pos"
        ):
            model(torch.full((1, tokens + 1), 7))


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_counted_positions_are_exported_with_free_shapes(tmp_path, family):
    make(family).save_pretrained(tmp_path)
    model = FastBertModel.from_pretrained(tmp_path)
    inputs = {name: value for name, value in batch(family).items() if name != "token_type_ids"}
    free = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=model.config.longest_sequence)}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, free))
    shorter = {name: value[1:, :9] for name, value in batch(family, "left").items() if name in inputs}
    actual = program.module()(**shorter).last_hidden_state
    torch.testing.assert_close(actual, model(**shorter).last_hidden_state, rtol=0, atol=1e-5)


LOAD_BUNDLES = """
import torch, transformers
for folder in sys.argv[1:]:
    saved = torch.load(folder + "/outputs.pt")
    model = getattr(transformers, saved["auto_class"]).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**saved["inputs"])[0], saved["logits"], rtol=0, atol=2e-5)
    print(folder)
"""


def test_without_the_package_the_saved_model_computes_what_the_original_did(tmp_path):
    folders = {"Bert": "ForMaskedLM", "Roberta": "ForSequenceClassification", "DistilBert": "ForMultipleChoice"}
    for family, head in folders.items():
        original = make(family, head)
        original.save_pretrained(tmp_path / "original")
        ours(head).from_pretrained(tmp_path / "original").save_pretrained(tmp_path / family)
        inputs = batch(family, "left", head)
        saved = {"auto_class": f"AutoModel{head}", "inputs": inputs, "logits": outputs_of(original, inputs).logits}
        torch.save(saved, tmp_path / family / "outputs.pt")
    assert run_without_package(LOAD_BUNDLES, *folders, cwd=tmp_path).split() == list(folders)


@pytest.mark.skipif(MINILM is None, reason="FASTBERT_MINILM names no folder with all-MiniLM-L6-v2")
def test_minilm_computes_what_it_did():
    """all-MiniLM-L6-v2 from Transformers and from here, on text of several lengths."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    texts = ["A cat sat on the mat.", "Trees of neurons " * 40, "?", Path(__file__).read_text()]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    original = transformers.BertModel.from_pretrained(MINILM)
    model = FastBertModel.from_pretrained(MINILM)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        first, second = (outputs_of(m.to(dtype), inputs).last_hidden_state for m in (model, original))
        difference = (first - second).abs()[inputs["attention_mask"].bool()].max().item()
        print(f"largest difference of last_hidden_state in {dtype}: {difference:.2e}")
        assert difference < tolerance
