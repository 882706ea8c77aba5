"""FastBertConfig: defaults, strictness, round trips."""

import pytest

from fastbert_hf import FastBertConfig, FastBertModel


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
