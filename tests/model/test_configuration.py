"""FastBertConfig: defaults, strictness, round trips."""

import json

import numpy
import pytest
from transformers import AutoConfig, AutoModelForMaskedLM, ElectraConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from fastbert_hf import FastBertConfig, FastBertForMaskedLM, FastBertModel


def test_defaults_are_the_published_model():
    config = FastBertConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (16, 768, 12)
    assert (config.vocab_size, config.max_position_embeddings) == (32768, 128)
    assert (config.fff_trees, config.fff_depth, config.norm_scheme, config.use_bias) == (1, 11, "pre", False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fff_depth": -1}, "fff_depth is -1; expected between 0 and 24"),
        ({"fff_trees": 0}, "fff_trees is 0; expected at least 1"),
        ({"fff_depth": "11"}, "fff_depth"),
        ({"hidden_size": 100}, "hidden_size is 100; expected a multiple of num_attention_heads, 12"),
        ({"hidden_size": 33, "num_attention_heads": 3}, "scaled_sinusoidal positions need an even one"),
        ({"norm_scheme": "middle"}, "norm_scheme"),
        ({"ffn_type": "moe"}, "ffn_type"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type"),
        ({"classifier_pooling": "attention"}, "classifier_pooling"),
        ({"sparse_prediction": 1.5}, "sparse_prediction is 1.5; expected between 0 and 1"),
        ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan; expected between 0 and 1"),
        ({"pad_token_id": 32768}, "pad_token_id is 32768; expected None or a value between 0 and vocab_size - 1"),
        ({"dense_gated": True}, "only 'dense' blocks are gated"),
        ({"position_numbering": "left"}, "position_numbering"),
        ({"position_numbering": "non_padding", "pad_token_id": None}, "pad_token_id is None; position_numbering"),
        (
            {"position_numbering": "non_padding", "pad_token_id": 3, "max_position_embeddings": 4},
            r"max_position_embeddings is 4; .* needs more than pad_token_id \+ 1, 4",
        ),
        ({"classifier_activation": "tan"}, "classifier_activation"),
        ({"mlm_head_act": "tanh"}, "mlm_head_act"),
        ({"vocab_size": 0, "pad_token_id": None}, "vocab_size is 0"),
        ({"fff_leaf_width": 0}, "fff_leaf_width is 0; expected at least 1"),
        ({"fff_leaf_width": -4}, "fff_leaf_width is -4; expected at least 1"),
        ({"fff_leaf_width": 2.5}, "fff_leaf_width"),
        ({"fff_leaf_width": "8"}, "fff_leaf_width"),
        ({"fff_leaf_width": 8, "fff_depth": 13}, "fff_depth is 13; expected at most 12 for leaf trees"),
        ({"fff_leaf_width": 8, "ffn_type": "dense"}, "fff_leaf_width is 8 with ffn_type 'dense'; only 'fff' layers"),
    ],
)
def test_wrong_values_raise_a_value_error_that_names_value_and_range(fields, message):
    with pytest.raises(ValueError, match=message):
        FastBertConfig(**fields)


def test_values_assigned_later_are_checked_before_a_model_is_built(tmp_path):
    config = FastBertConfig(num_hidden_layers=1)
    with pytest.raises(ValueError, match="expected int, got str"):
        config.fff_depth = "deep"
    FastBertConfig().save_pretrained(tmp_path)
    config = FastBertConfig.from_pretrained(tmp_path, fff_trees=0)
    with pytest.raises(ValueError, match="fff_trees is 0; expected at least 1"):
        FastBertModel(config)


def test_a_stored_configuration_is_checked_and_round_trips(tmp_path):
    config = FastBertConfig(fff_depth=5, num_labels=3, norm_scheme="post", use_bias=True)
    config.save_pretrained(tmp_path)
    assert FastBertConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"fff_depth": 5', '"fff_depth": -5'))
    with pytest.raises(ValueError, match="fff_depth is -5"):
        FastBertConfig.from_pretrained(tmp_path)


def test_neurons_are_counted():
    assert FastBertConfig(fff_depth=9, fff_trees=2).neurons_per_token == 20
    assert FastBertConfig(fff_depth=9, fff_trees=2).neurons_per_layer == 2046
    leaves = FastBertConfig(fff_depth=5, fff_trees=2, fff_leaf_width=96)
    assert (leaves.neurons_per_token, leaves.neurons_per_layer) == (192, 6144)
    dense = FastBertConfig(ffn_type="dense", intermediate_size=511)
    assert dense.neurons_per_token == dense.neurons_per_layer == 511


def test_the_backend_is_never_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    FastBertConfig().save_pretrained(tmp_path)
    assert "backend" not in (tmp_path / "config.json").read_text()


def edit(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def loaded_with_warnings(folder):
    with CaptureLogger(logging.get_logger("fastbert_hf.configuration_fastbert")) as captured:
        config = AutoConfig.from_pretrained(folder)
    return config, captured.out


def test_sparse_prediction_is_off_unless_asked_for_and_always_stored(tmp_path):
    """Stored, it keeps its meaning whatever the default is: a file that holds 0.25 by an older default means 0.25."""
    assert FastBertConfig().sparse_prediction == 0
    for share in (FastBertConfig().sparse_prediction, 0.25):
        FastBertConfig(sparse_prediction=share).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["sparse_prediction"] == share
        assert FastBertConfig.from_pretrained(tmp_path).sparse_prediction == share


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("ffn_depth", "fff_depth"),
        ("fff_tree", "fff_trees"),
        ("hidden_sizes", "hidden_size"),
        ("num_hidden_layer", "num_hidden_layers"),
        ("layer_norm_epsilon", "layer_norm_eps"),
        ("tie_word_embedding", "tie_word_embeddings"),
    ],
)
def test_misspelt_keys_are_refused_where_typed_and_warned_of_where_stored(tmp_path, key, field):
    message = f"has no field '{key}'; did you mean '{field}'"
    with pytest.raises(ValueError, match=message):
        FastBertConfig(**{key: 3})
    with pytest.raises(ValueError, match=message):
        AutoConfig.for_model("fastbert", **{key: 3})
    FastBertConfig().save_pretrained(tmp_path)
    for load in (FastBertConfig.from_pretrained, AutoConfig.from_pretrained, AutoModelForMaskedLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **{key: 3})
    edit(tmp_path, **{key: 3})
    config, warnings = loaded_with_warnings(tmp_path)
    assert message in warnings
    assert getattr(config, key) == 3  # a later version may know it: it survives saving
    type(config)(**config.to_dict())  # as tools copy configurations


def test_keys_of_others_are_kept_without_a_word(tmp_path):
    others = {"sep_token_id": 3, "mask_token_id": 4, "is_decoder": False, "my_note": "x"}
    FastBertConfig(**others, num_labels=3, attn_implementation="eager", torch_dtype="float32").save_pretrained(
        tmp_path
    )
    config, warnings = loaded_with_warnings(tmp_path)
    assert warnings == ""
    assert {name: getattr(config, name) for name in others} == others and config.num_labels == 3


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = FastBertConfig(
        hidden_size=numpy.int64(768),
        fff_depth=numpy.int32(5),
        hidden_dropout_prob=numpy.float32(0.5),
        use_bias=numpy.bool_(True),
        num_labels=numpy.int64(3),
    )
    config.fff_trees = numpy.int16(2)
    config.my_note = numpy.float64(0.5)
    assert (type(config.fff_depth), type(config.fff_trees), type(config.use_bias)) == (int, int, bool)
    config.save_pretrained(tmp_path)
    assert FastBertConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="expected int, got float"):
        FastBertConfig(fff_depth=numpy.float64(5))
    with pytest.raises(ValueError, match="fff_depth is 25; expected between 0 and 24"):
        FastBertConfig(fff_depth=numpy.int64(25))
    with pytest.raises(ValueError, match="expected int, got ndarray"):
        FastBertConfig(fff_depth=numpy.array([5]))


def test_a_configuration_of_another_model_is_refused_by_its_type(tmp_path):
    ElectraConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    message = "the configuration is of model_type 'electra'; expected 'fastbert' or 'crammedBERT' or 'bert' or"
    for cls in (FastBertConfig, FastBertForMaskedLM):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(tmp_path)
