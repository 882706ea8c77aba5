"""Configurations, old and partial checkpoints of the BERT family, and what of them is refused."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import WeightRenaming, rename_source_key

from fastbert_hf import (
    FastBertConfig,
    FastBertForMaskedLM,
    FastBertForSequenceClassification,
    FastBertModel,
    bert_layouts,
)
from fastbert_hf.training.runs import check_fit
from tests.model.test_bert_layouts import (
    HEADS,
    POSITIONS,
    SIZES,
    assert_same,
    assert_same_parameters,
    batch,
    make,
    ours,
    outputs_of,
)


def edit_config(folder, drop=(), **entries):
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(config | entries))


def edit_tensors(folder, rename):
    path = folder / "model.safetensors"
    tensors = {new: value for name, value in load_file(path).items() for new in rename(name)}
    save_file({name: value.clone() for name, value in tensors.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_labels_problem_type_and_dropout_carry_over(tmp_path, family):
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.4}
    if family == "DistilBert":
        dropout = {"dropout": 0.2, "attention_dropout": 0.3, "seq_classif_dropout": 0.4}
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    problem = {"problem_type": "multi_label_classification"}
    original = make(family, "ForSequenceClassification", **labels, **problem, **dropout)
    original.save_pretrained(tmp_path)
    model = FastBertForSequenceClassification.from_pretrained(tmp_path)
    config = model.config
    assert config.num_labels == 3 and {name: getattr(config, name) for name in labels} == labels
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout) == (
        0.2,
        0.3,
        0.4,
    )
    inputs = batch(family) | {"labels": torch.randint(2, (4, 3)).float()}
    assert_same(outputs_of(model, inputs), outputs_of(original, inputs))


def test_dropout_of_a_head_is_the_one_that_its_class_used(tmp_path):
    for family, head, changes in [
        ("Bert", "ForTokenClassification", {"hidden_dropout_prob": 0.3}),
        ("Roberta", "ForMultipleChoice", {"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2}),
        ("DistilBert", "ForTokenClassification", {"dropout": 0.3, "seq_classif_dropout": 0.2}),
    ]:
        make(family, head, **changes).save_pretrained(tmp_path)
        assert FastBertConfig.from_pretrained(tmp_path).classifier_dropout == 0.3


def test_old_names_buffers_and_heads_that_we_lack_load_without_complaint(tmp_path):
    original = make("Bert", "ForPreTraining")
    original.save_pretrained(tmp_path)

    def rename(name):
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        copies = {"cls.predictions.bias": ["cls.predictions.decoder.bias"]}
        copies["bert.embeddings.word_embeddings.weight"] = ["cls.predictions.decoder.weight"]
        return [old, *copies.get(name, [])]

    edit_tensors(tmp_path, rename)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(POSITIONS).unsqueeze(0)
    assert "cls.seq_relationship.weight" in tensors and "bert.pooler.dense.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    inputs = batch("Bert")
    expected = outputs_of(original, inputs)
    model = FastBertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs_of(model, inputs).logits, expected.prediction_logits, rtol=0, atol=2e-5)
    assert model.mlm_head.decoder.weight is model.fastbert.embeddings.word_embeddings.weight
    classifier = FastBertForSequenceClassification.from_pretrained(tmp_path)  # its classifier is new
    assert torch.equal(classifier.pooler.dense.weight, original.bert.pooler.dense.weight)


def test_a_base_model_without_pooler_loads_under_every_head(tmp_path):
    make("Bert").save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda name: [] if "pooler" in name else [name])
    assert all(ours(head).from_pretrained(tmp_path).dtype == torch.float32 for head in ["Model", *HEADS])


def test_a_roberta_classifier_is_not_taken_for_the_pooler_beside_it(tmp_path):
    original = make("Roberta", "ForSequenceClassification")
    original.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"roberta.pooler.dense.weight": torch.randn(32, 32), "roberta.pooler.dense.bias": torch.randn(32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = FastBertForSequenceClassification.from_pretrained(tmp_path)
    assert_same(outputs_of(model, batch("Roberta")), outputs_of(original, batch("Roberta")))


def test_a_checkpoint_that_lacks_a_layer_or_holds_another_is_refused(tmp_path):
    make("Bert").save_pretrained(tmp_path)
    edit_config(tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"missing \(layers\.2\."):
        FastBertModel.from_pretrained(tmp_path)
    edit_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"unexpected \(layers\.1\."):
        FastBertModel.from_pretrained(tmp_path)


def test_what_cannot_be_expressed_is_one_error_that_lists_it(tmp_path):
    make("Bert").save_pretrained(tmp_path)
    changes = {
        "position_embedding_type": "relative_key_query",
        "is_decoder": True,
        "add_cross_attention": True,
        "hidden_act": "quick_gelu",
        "embedding_size": 16,
        "auto_map": {"AutoModel": "modeling.Other"},
    }
    edit_config(tmp_path, **changes)
    for cls in (FastBertConfig, FastBertModel, FastBertForMaskedLM):
        with pytest.raises(ValueError, match="FastBERT cannot express this bert") as error:
            cls.from_pretrained(tmp_path)
        assert all(f"{key} is {value!r}; expected" in str(error.value) for key, value in changes.items())
    edit_config(tmp_path, drop=changes, pad_token_id=None)
    assert FastBertModel.from_pretrained(tmp_path).config.pad_token_id is None
    make("Roberta").save_pretrained(tmp_path)
    edit_config(tmp_path, pad_token_id=None)
    with pytest.raises(ValueError, match="cannot express this roberta: pad_token_id is None"):
        FastBertConfig.from_pretrained(tmp_path)
    edit_config(tmp_path, hidden_size="wide")
    with pytest.raises(ValueError, match=r"configuration of a roberta holds a wrong value.*hidden_size"):
        FastBertConfig.from_pretrained(tmp_path)


def test_a_checkpoint_in_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    original = make("Bert")
    original.save_pretrained(tmp_path)
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"pytorch_model\.bin.*writes safetensors: python -c .*save_pretrained"):
        FastBertModel.from_pretrained(tmp_path)


def test_defaults_of_a_family_stand_in_for_what_a_file_leaves_out_and_its_notes_stay():
    config = FastBertConfig.from_dict({"model_type": "roberta", "my_note": "x", "sep_token_id": 2, "fff_depth": 3})
    reference = transformers.RobertaConfig()
    assert (config.vocab_size, config.type_vocab_size) == (reference.vocab_size, reference.type_vocab_size)
    assert (config.my_note, config.sep_token_id, config.fff_depth) == ("x", 2, FastBertConfig().fff_depth)


def test_the_auto_classes_keep_the_models_of_transformers(tmp_path):
    make("Bert").save_pretrained(tmp_path)
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is transformers.BertModel
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is transformers.BertConfig


def test_trainings_know_how_long_a_sequence_may_be(tmp_path):
    make("Roberta").save_pretrained(tmp_path)
    config, vocabulary = (
        FastBertConfig.from_pretrained(tmp_path),
        range(SIZES["vocab_size"]),
    )  # only its length counts
    check_fit(config, vocabulary, POSITIONS - 2)
    with pytest.raises(ValueError, match="max_position_embeddings 20, of which a sequence can use 18"):
        check_fit(config, vocabulary, POSITIONS - 1)


def test_names_of_the_native_layout_are_left_alone():
    conversions = bert_layouts.weight_conversions()
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if not isinstance(entry, WeightRenaming)]
    for form in ({"fff_depth": 2}, {"fff_depth": 2, "fff_leaf_width": 3}, {"ffn_type": "dense"}):
        for head in ["Model", *HEADS]:
            geometry = SIZES | {
                "type_vocab_size": 2,
                "use_bias": True,
                "mlm_head_transform": True,
                "decoder_bias": True,
            }
            names = ours(head)(FastBertConfig(**geometry, **form)).state_dict()
            assert all(rename_source_key(name, renamings, converters) == (name, None) for name in names)


def test_a_changed_configuration_can_be_passed(tmp_path):
    make("Bert").save_pretrained(tmp_path)
    config = FastBertConfig.from_pretrained(tmp_path, attention_probs_dropout_prob=0.0)
    model = FastBertModel.from_pretrained(tmp_path, config=copy.deepcopy(config))
    assert model.config.attention_probs_dropout_prob == 0.0
    assert_same_parameters(model, FastBertModel.from_pretrained(tmp_path))
