"""Checkpoints of the published layout: everything recorded from the reference reproduces."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from fastbert_hf import FastBertConfig, FastBertForMaskedLM, FastBertForSequenceClassification, FastBertModel
from fastbert_hf.published_layout import native_config
from tests.oracle import published_forward

FIXTURES = Path(__file__).parents[1] / "fixtures"
MLM = ["mlm-1x3", "mlm-2x2", "mlm-4x0"]
CLASSIFICATION = ["seqcls-1x3", "seqcls-1x3-zero"]


def auto_class(name):
    return AutoModelForMaskedLM if name in MLM else AutoModelForSequenceClassification


def load(name, attention="sdpa"):
    model, info = auto_class(name).from_pretrained(
        FIXTURES / name, output_loading_info=True, attn_implementation=attention
    )
    assert not any(info.values()), info
    return model.eval(), load_file(FIXTURES / name / "io.safetensors")


def assert_near(value, expected, atol, rtol=0.0):
    torch.testing.assert_close(value, expected, atol=atol, rtol=rtol)


def logits_tolerance(name):
    return (5e-5, 1e-5) if name in MLM else (2e-5, 0.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MLM + CLASSIFICATION)
def test_every_recorded_state_reproduces(name, attention):
    model, recorded = load(name, attention)
    with torch.no_grad():
        outputs = model(
            recorded["input_ids"], recorded["attention_mask"], labels=recorded["labels"], output_hidden_states=True
        )
        assert_near(outputs.logits, recorded["logits"], *logits_tolerance(name))
        assert_near(outputs.loss, recorded["loss"], 1e-5)
        states = outputs.hidden_states  # embedding, then each layer; the last one after the final norm
        assert_near(states[0], recorded["embedding_output"], 2e-5)
        assert_near(states[1], recorded["layer_output.0"], 2e-5)
        assert_near(states[-1], recorded["last_hidden_state"], 2e-5)
        for case in ("nomask", "short"):
            ids = recorded.get(f"{case}.input_ids", recorded["input_ids"])
            outputs = model(ids, output_hidden_states=True)
            assert_near(outputs.logits, recorded[f"{case}.logits"], *logits_tolerance(name))
            assert_near(outputs.hidden_states[-1], recorded[f"{case}.last_hidden_state"], 2e-5)


@pytest.mark.parametrize("name", MLM + CLASSIFICATION)
def test_visited_nodes_are_equal(name):
    model, recorded = load(name)
    visited = {}
    for index, layer in enumerate(model.fastbert.layers):
        layer.ffn.register_forward_pre_hook(lambda ffn, args, i=index: visited.__setitem__(i, ffn.route(args[0])))
    with torch.no_grad():
        model(recorded["input_ids"], recorded["attention_mask"])
    for index in range(len(model.fastbert.layers)):
        assert torch.equal(visited[index], recorded[f"visited.{index}"])


def native_gradients(model, recorded):
    """Recorded gradients under native names, in the order q, k, v rows of every head."""
    heads = model.config.num_attention_heads
    gradients = {}
    for key, value in recorded.items():
        if not key.startswith("grad."):
            continue
        key = key.removeprefix("grad.").replace(
            "encoder.embedding.word_embedding", "fastbert.embeddings.word_embeddings"
        )
        key = key.replace("encoder.embedding.pos_embedding.scale_factor", "fastbert.embeddings.position_scale")
        key = key.replace("encoder.embedding", "fastbert.embeddings").replace("encoder.", "fastbert.")
        key = key.replace(".norm1.", ".attention_norm.").replace(".norm2.", ".ffn_norm.")
        key = key.replace(".attn.dense.", ".attention.output.").replace("head.", "classifier.")
        if "query_key_value" in key:
            rows = value.view(heads, 3, -1, value.shape[-1])
            for i, part in enumerate(("query", "key", "value")):
                name = key.replace("attn.self_attention.query_key_value", f"attention.{part}")
                gradients[name] = rows[:, i].reshape(-1, value.shape[-1])
        elif "linear_in" in key:
            gradients[key.replace("linear_in.weight", "weight_in").replace("linear_in.bias", "bias_in")] = value
        elif "linear_out" in key:
            gradients[key.replace("linear_out.weight", "weight_out")] = value.T
        else:
            gradients[key] = value
    return gradients


def test_sparse_prediction_of_a_published_checkpoint_is_kept_when_it_is_saved_again(tmp_path):
    model, recorded = load("mlm-1x3")
    model.save_pretrained(tmp_path)
    again = FastBertForMaskedLM.from_pretrained(tmp_path).train()
    assert model.config.sparse_prediction == again.config.sparse_prediction == 0.25
    labelled = int((recorded["labels"] != -100).sum())
    assert again(recorded["input_ids"], labels=recorded["labels"]).logits.shape[:-1] == (labelled,)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("name", MLM + CLASSIFICATION)
def test_every_gradient_reproduces(name, sparse):
    model, recorded = load(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    model.config.sparse_prediction = 0.25 if sparse else 0.0
    model.train()
    loss = model(recorded["input_ids"], recorded["attention_mask"], labels=recorded["labels"]).loss
    assert_near(loss, recorded["loss"], 1e-5)
    loss.backward()
    expected = native_gradients(model, recorded)
    parameters = dict(model.named_parameters())
    assert set(expected) == set(parameters)
    for key, parameter in parameters.items():
        assert_near(parameter.grad, expected[key], 1e-5, 1e-4)


@pytest.mark.parametrize("name", MLM)
def test_sparse_and_full_losses_reproduce(name):
    model, recorded = load(name)
    for case in ("under", "over"):
        loss = model(recorded["input_ids"], recorded["attention_mask"], labels=recorded[f"{case}.labels"]).loss
        assert_near(loss, recorded[f"{case}.loss_full"], 1e-5)
    assert_near(
        model(recorded["input_ids"], recorded["attention_mask"], labels=recorded["under.labels"]).loss,
        recorded["under.loss_sparse"],
        1e-5,
    )
    # beyond its quota the reference drops labels by an unstable sort: only the recorded choice can be checked
    kept = torch.full_like(recorded["over.labels"], -100).flatten()
    kept[recorded["over.sparse_indices"]] = recorded["over.labels"].flatten()[recorded["over.sparse_indices"]]
    loss = model(recorded["input_ids"], recorded["attention_mask"], labels=kept.view_as(recorded["labels"])).loss
    assert_near(loss, recorded["over.loss_sparse"], 1e-5)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_multi_label_loss_reproduces(name):
    model, recorded = load(name)
    loss = model(recorded["input_ids"], recorded["attention_mask"], labels=recorded["multi.labels"]).loss
    assert_near(loss, recorded["multi.loss"], 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_without_visible_keys_and_masks_per_query_reproduce(attention):
    model, recorded = load("mlm-1x3", attention)
    with torch.no_grad():
        full = model(recorded["fullmask.input_ids"], recorded["fullmask.attention_mask"]).logits
        unmasked = model(recorded["fullmask.input_ids"]).logits
        per_query = model(recorded["mask3d.input_ids"], recorded["mask3d.attention_mask"], output_hidden_states=True)
    assert_near(full, recorded["fullmask.logits"], 1e-2)  # the reference rounds these scores to about 1e-3
    assert_near(full, unmasked, 1e-5)
    assert_near(per_query.logits, recorded["mask3d.logits"], 5e-5, 1e-5)
    assert_near(per_query.hidden_states[-1], recorded["mask3d.last_hidden_state"], 2e-5)


@pytest.mark.parametrize("name", MLM + CLASSIFICATION)
def test_the_bare_encoder_loads_with_no_missing_or_unexpected_tensor(name):
    model, info = AutoModel.from_pretrained(FIXTURES / name, output_loading_info=True)
    assert type(model) is FastBertModel and not any(info.values())
    recorded = load_file(FIXTURES / name / "io.safetensors")
    with torch.no_grad():
        hidden = model(recorded["input_ids"], recorded["attention_mask"]).last_hidden_state
    assert_near(hidden, recorded["last_hidden_state"], 2e-5)


@pytest.mark.parametrize("dropped", ["decoder.weight", "encoder.embedding.word_embedding.weight", None])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "encoder._orig_mod."])
def test_one_copy_of_the_tied_decoder_and_compiled_prefixes_load(tmp_path, dropped, prefix):
    tensors = load_file(FIXTURES / "mlm-1x3" / "model.safetensors")
    tensors.pop(dropped, None)
    if prefix.startswith("encoder"):
        tensors = {key.replace("encoder.", prefix, 1): value for key, value in tensors.items()}
    else:
        tensors = {prefix + key: value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((FIXTURES / "mlm-1x3" / "config.json").read_text())
    recorded = load_file(FIXTURES / "mlm-1x3" / "io.safetensors")
    for cls in (AutoModelForMaskedLM, AutoModel, AutoModelForSequenceClassification):
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        head = {"classifier.weight", "classifier.bias"} | {"pooler.dense.weight", "pooler.dense.bias"}
        allowed = head if cls is AutoModelForSequenceClassification else set()
        assert set(info["missing_keys"]) == allowed and not info["unexpected_keys"]
        encoder = model if cls is AutoModel else model.fastbert
        with torch.no_grad():
            hidden = encoder.eval()(recorded["input_ids"], recorded["attention_mask"]).last_hidden_state
        assert_near(hidden, recorded["last_hidden_state"], 2e-5)
        if cls is AutoModelForMaskedLM:
            assert model.mlm_head.decoder.weight is model.fastbert.embeddings.word_embeddings.weight


def test_copies_of_the_tied_decoder_that_differ_are_an_error(tmp_path):
    tensors = load_file(FIXTURES / "mlm-1x3" / "model.safetensors")
    tensors["decoder.weight"] = tensors["decoder.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((FIXTURES / "mlm-1x3" / "config.json").read_text())
    with pytest.raises(RuntimeError, match="conver"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", MLM + CLASSIFICATION)
def test_saving_writes_the_native_layout_and_a_round_trip_is_bit_equal(tmp_path, name):
    model, recorded = load(name)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fastbert"
    tied = {"mlm_head.decoder.weight"}
    assert set(stored) == set(model.state_dict()) - tied
    again, info = auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    with torch.no_grad():
        first, second = (m.eval()(recorded["input_ids"], recorded["attention_mask"]).logits for m in (model, again))
    assert torch.equal(first, second)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("nonlin", ["GELU", "GELUglu"])
@pytest.mark.parametrize("names_its_type", [True, False])
def test_dense_checkpoints_load_and_compute_as_published(tmp_path, nonlin, names_its_type):
    """No dense weights were recorded: the oracle, itself checked on the recorded trees, stands in."""
    config = json.loads((FIXTURES / "mlm-1x3" / "config.json").read_text())
    arch = config["arch"]
    arch |= {"intermed_size": 48, "nonlin": nonlin, "intermed_type": "ff"}
    if not names_its_type:
        del arch["intermed_type"], arch["intermed_depth"]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, value in load_file(FIXTURES / "mlm-1x3" / "model.safetensors").items():
        if "linear_in.weight" in key:
            name = key.replace("linear_in", "dense_in")
            tensors[name] = torch.randn(48, 32, generator=generator) * 0.3
            width = 24 if nonlin == "GELUglu" else 48
            tensors[name.replace("dense_in", "dense_out")] = torch.randn(32, width, generator=generator) * 0.3
        elif "linear_" not in key:
            tensors[key] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    recorded = load_file(FIXTURES / "mlm-1x3" / "io.safetensors")
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and model.config.ffn_type == "dense"
    hidden = published_forward(arch, tensors, recorded["input_ids"], recorded["attention_mask"])
    with torch.no_grad():
        outputs = model.eval()(recorded["input_ids"], recorded["attention_mask"], output_hidden_states=True)
    assert_near(outputs.hidden_states[-1], hidden, 2e-5)
    assert_near(outputs.logits, hidden @ tensors["decoder.weight"].T, 5e-5, 1e-5)
    model.save_pretrained(tmp_path / "native")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "native").eval()
    with torch.no_grad():
        assert torch.equal(again(recorded["input_ids"], recorded["attention_mask"]).logits, outputs.logits)


@pytest.mark.parametrize("name", MLM)
def test_the_oracle_itself_reproduces_the_recorded_states(name):
    arch = json.loads((FIXTURES / name / "config.json").read_text())["arch"]
    tensors, recorded = (load_file(FIXTURES / name / file) for file in ("model.safetensors", "io.safetensors"))
    hidden = published_forward(arch, tensors, recorded["input_ids"], recorded["attention_mask"])
    assert_near(hidden, recorded["last_hidden_state"], 2e-5)


def test_the_published_geometry_has_the_published_parameters():
    config = AutoConfig.from_pretrained(FIXTURES / "mlm-1x3")
    assert type(config) is FastBertConfig
    with torch.device("meta"):
        model = FastBertForMaskedLM(FastBertConfig())
    parameters = sum(p.numel() for p in model.parameters())  # tied ones once
    assert parameters == 163_671_025
    # the published file stores the tied decoder again, and one constant a layer
    assert parameters + 32768 * 768 + 16 == 188_836_865
    assert (model.config.neurons_per_token, model.config.neurons_per_layer) == (12, 4095)


def test_configurations_this_model_cannot_express_are_refused():
    config = json.loads((FIXTURES / "mlm-1x3" / "config.json").read_text())

    def change(**arch):
        return config | {"arch": config["arch"] | arch}

    for bad, message in [
        (change(norm="RMSNorm"), "arch.norm is 'RMSNorm'; expected 'LayerNorm'"),
        (change(nonlin="Mish"), "arch.nonlin is 'Mish'; expected one of GELU"),
        (change(intermed_type="moe"), "arch.intermed_type is 'moe'"),
        (change(nonlin="GELUglu"), "trees have no gated units"),
        (change(attention=config["arch"]["attention"] | {"rotary_embedding": True}), "rotary_embedding is True"),
        (change(nonlin=5), "arch holds a value of the wrong type"),
        (change(embedding=None), "arch holds a value of the wrong type"),
        (change(hidden_dropout_prob=None), "arch holds a value of the wrong type"),
        ({"model_type": "crammedBERT"}, "needs a dictionary 'arch'"),
        ({"arch": {k: v for k, v in config["arch"].items() if k != "hidden_size"}}, "no key 'hidden_size'"),
    ]:
        with pytest.raises(ValueError, match=message):
            native_config(bad)


def test_our_class_loads_the_published_layout_directly_and_nothing_else_is_disturbed():
    model = FastBertForSequenceClassification.from_pretrained(FIXTURES / "seqcls-1x3")
    assert model.config.num_labels == 3 and model.config.classifier_pooling == "mean_all"
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert bert(torch.ones(1, 2).long()).last_hidden_state.shape == (1, 2, 8)
