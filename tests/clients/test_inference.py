"""Models prepared for inference: every head and type, saved and loaded again, and the clients that open them."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import fastbert_hf
from fastbert_hf import (
    FastBertForSequenceClassification,
    FastBertModel,
    FastBertQuantizationConfig,
    LeafFeedForward,
    inference_fastbert,
    prepare_for_inference,
)
from fastbert_hf.inference_fastbert import FusedLayer
from fastbert_hf.quantized_layer import QuantizedFastFeedForward, QuantizedLeafFeedForward
from fastbert_hf.quantized_linear import QuantizedLinear
from tests.clients.helpers import random_batch, run_without_package, tiny_model
from tests.clients.test_hub_code import MODEL_CLASSES, batch_for

LEAVES = {"fff_leaf_width": 5}
POST = {"norm_scheme": "post", "use_bias": True, "type_vocab_size": 2, "position_embedding_type": "absolute"}
DENSE = {"ffn_type": "dense", "intermediate_size": 48, "dense_gated": True}
FORMS = {"nodes": {}, "leaves": LEAVES, "leaves of BERT": {**LEAVES, **POST}, "dense": DENSE}
TYPES = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("int8", None),
    "int8 and bfloat16": ("int8", "bfloat16"),
}
# of the size of a model's output, where no path changes: rounding to 8 bits, float32's last bits
ERROR = {"float32": 1e-6, "bfloat16": 0.05, "int8": 0.1, "int8 and bfloat16": 0.1}
WORDS = ["the tree walks left .", "one root", "fast node visits the leaf ?"]

each_type = pytest.mark.parametrize("types", TYPES)


def prepared(model: torch.nn.Module, types: str) -> torch.nn.Module:
    return prepare_for_inference(copy.deepcopy(model), *TYPES[types])


@torch.no_grad()
def output(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Its first tensor: hidden states or logits."""
    return model(**inputs)[0].float()


def wide_model(model_class: type, **form) -> torch.nn.Module:
    """A tiny model whose decisions are far from a tie, so that rounding changes no path."""
    model = tiny_model(model_class, **form)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LeafFeedForward):
                module.threshold.copy_(torch.where(torch.arange(len(module.threshold)) % 2 == 0, 50.0, -50.0))
            elif isinstance(module, fastbert_hf.FastFeedForward):
                module.bias_in.copy_(torch.where(torch.arange(len(module.bias_in)) % 2 == 0, 5.0, -5.0))
    return model


@each_type
@pytest.mark.parametrize("form", FORMS)
def test_a_prepared_encoder_gives_the_models_numbers(form, types):
    model = wide_model(FastBertModel, **FORMS[form])
    inputs = random_batch(3, 9)
    given, expected = output(prepared(model, types), inputs), output(model, inputs)
    seen = inputs["attention_mask"].bool()
    distance = (given - expected)[seen].norm() / expected[seen].norm()
    assert distance <= ERROR[types]
    if types != "float32":
        assert distance > 1e-5, "nothing was rounded"


@each_type
@pytest.mark.parametrize("auto_class", MODEL_CLASSES)
def test_every_head_loads_as_it_was_saved_bit_for_bit(auto_class, types, tmp_path):
    model = prepared(tiny_model(MODEL_CLASSES[auto_class], num_labels=3, **LEAVES), types)
    model.save_pretrained(tmp_path)
    again = MODEL_CLASSES[auto_class].from_pretrained(tmp_path)
    assert again.is_prepared and not again.training
    assert type(again.base_model.layers[0]) is FusedLayer
    inputs = batch_for(auto_class)
    assert torch.equal(output(again, inputs), output(model, inputs))
    again.save_pretrained(tmp_path / "again")
    files = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]


@each_type
@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_as_it_was_saved_and_can_be_prepared_while_loaded(form, types, tmp_path):
    model = tiny_model(FastBertModel, **FORMS[form])
    expected = output(prepared(model, types), random_batch(3, 9))
    model.save_pretrained(tmp_path / "float")
    prepared(model, types).save_pretrained(tmp_path / "prepared")
    wanted = FastBertQuantizationConfig(*TYPES[types])
    loaded = AutoModel.from_pretrained(tmp_path / "float", quantization_config=wanted)
    loaded.save_pretrained(tmp_path / "loaded")
    for again in (loaded, *(AutoModel.from_pretrained(tmp_path / name) for name in ("prepared", "loaded"))):
        assert torch.equal(output(again, random_batch(3, 9)), expected)


def test_an_encoder_is_taken_from_the_folder_of_a_prepared_head(tmp_path):
    model = prepared(tiny_model(FastBertForSequenceClassification, **LEAVES), "int8")
    model.save_pretrained(tmp_path)
    encoder = FastBertModel.from_pretrained(tmp_path)
    assert encoder.is_prepared
    assert torch.equal(output(encoder, random_batch(3, 9)), output(model.fastbert, random_batch(3, 9)))


@each_type
def test_a_bert_is_prepared_while_it_is_loaded(types, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    bert = BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, initializer_range=0.2, **sizes)).eval()
    bert.save_pretrained(tmp_path / "bert")
    wanted = FastBertQuantizationConfig(*TYPES[types])
    model = FastBertModel.from_pretrained(tmp_path / "bert", quantization_config=wanted)
    inputs = random_batch(3, 9)
    inputs["input_ids"] = inputs["input_ids"] % 64
    seen = inputs["attention_mask"].bool()
    expected = output(bert, inputs)[seen]
    assert (output(model, inputs)[seen] - expected).norm() <= ERROR[types] * expected.norm()
    model.save_pretrained(tmp_path / "prepared")
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path / "prepared"), inputs), output(model, inputs))


def test_layers_are_of_the_types_that_were_asked_for():
    model = tiny_model(FastBertModel, **LEAVES)
    layer = prepared(model, "int8").layers[0]
    assert type(layer.ffn) is QuantizedLeafFeedForward and type(layer.attention.output) is QuantizedLinear
    layer = prepared(model, "int8 and bfloat16").layers[0]
    assert type(layer.ffn) is QuantizedLeafFeedForward and type(layer.attention.output) is torch.nn.Linear
    nodes = prepared(tiny_model(FastBertModel), "int8").layers[0]
    assert type(nodes.ffn) is QuantizedFastFeedForward
    whole = prepared(model, "bfloat16")
    assert whole.layers[0].ffn.weight_in.dtype == torch.bfloat16
    assert whole.embeddings.word_embeddings.weight.dtype == whole.layers[0].ffn_norm.weight.dtype == torch.float32


def test_a_folder_says_how_it_was_prepared_and_int8_makes_it_smaller(tmp_path):
    model = tiny_model(FastBertModel, hidden_size=64, fff_leaf_width=16)
    model.save_pretrained(tmp_path / "float")
    prepared(model, "int8").save_pretrained(tmp_path / "int8")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization_config"] == {"dtype": "int8", "linear_dtype": "int8", "quant_method": "fastbert"}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "int8")]
    assert sizes[1] < sizes[0] / 2
    assert not list((tmp_path / "int8").glob("*.bin"))


def test_a_state_dict_names_query_key_and_value_apart():
    model = tiny_model(FastBertModel, **LEAVES)
    fused = prepared(model, "float32")
    assert fused.state_dict().keys() == model.state_dict().keys()
    other = tiny_model(FastBertModel, seed=1, **LEAVES)
    fused.load_state_dict(other.state_dict())
    inputs = random_batch(3, 9)
    torch.testing.assert_close(output(fused, inputs), output(other, inputs), rtol=1e-5, atol=1e-5)


def test_hidden_states_and_eager_attention_weights_are_given():
    model = tiny_model(FastBertModel, **LEAVES)
    fused = prepared(model, "float32")
    for each in (model, fused):
        each.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        given, expected = (each(**random_batch(3, 9), **wanted) for each in (fused, model))
    for name in ("hidden_states", "attentions"):
        torch.testing.assert_close(getattr(given, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@each_type
def test_masks_of_every_shape_are_used(types):
    model = prepared(tiny_model(FastBertModel, **LEAVES), types)
    inputs = random_batch(2, 9)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = output(model, inputs)
    rounding = {"float32": 1e-6, "int8": 2e-3}.get(types, 2e-2)  # masks of (B, heads, T, T) take PyTorch's attention
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~mask[:, None, None].bool(), -1e9)
    for other in (mask[:, None, :].expand(2, 9, 9), mask[:, None, None].bool().expand(2, 1, 9, 9), additive):
        given = output(model, {"input_ids": ids, "attention_mask": other})
        assert (given - expected).norm() <= rounding * expected.norm()
    assert (output(model, {"input_ids": ids}) - expected).norm() > 0.05 * expected.norm()


@each_type
def test_a_compiled_model_gives_the_numbers_of_its_own(types):
    torch._dynamo.reset()
    model = prepared(wide_model(FastBertModel, **LEAVES), types)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for shape in ((3, 9), (2, 12)):
        inputs = random_batch(*shape)
        given, expected = output(compiled, inputs), output(model, inputs)
        assert (given - expected).norm() <= 0.02 * expected.norm()
    torch._dynamo.reset()


def test_training_is_an_error_that_says_what_to_do(tmp_path):
    model = prepared(tiny_model(FastBertForSequenceClassification, **LEAVES), "int8")
    with pytest.raises(ValueError, match="prepared for inference and cannot be trained"):
        model.train()
    assert not model.training and model.eval() is model
    with pytest.raises(ValueError, match=r"purely quantized models|do not support training"):
        Trainer(model, TrainingArguments(str(tmp_path), report_to=[]), train_dataset=[])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_preparing_again_does_nothing_and_in_another_type_is_an_error():
    model = tiny_model(FastBertModel, **LEAVES)
    assert prepare_for_inference(model, "int8") is model
    layer = model.layers[0]
    assert prepare_for_inference(model, "int8").layers[0] is layer
    for types in (("float32",), ("int8", "bfloat16")):
        with pytest.raises(ValueError, match="prepared for inference already, with dtype 'int8'"):
            prepare_for_inference(model, *types)


def test_loading_a_prepared_folder_in_another_type_is_an_error(tmp_path):
    prepared(tiny_model(FastBertModel, **LEAVES), "int8").save_pretrained(tmp_path)
    same = FastBertModel.from_pretrained(tmp_path, quantization_config=FastBertQuantizationConfig("int8"))
    assert same.is_prepared
    for wanted in (FastBertQuantizationConfig("float32"), FastBertQuantizationConfig("int8", "bfloat16")):
        with pytest.raises(ValueError, match="the stored model is prepared for inference with"):
            FastBertModel.from_pretrained(tmp_path, quantization_config=wanted)


def test_wrong_types_modules_and_adapters_are_errors():
    model = tiny_model(FastBertModel, **LEAVES)
    with pytest.raises(ValueError, match="dtype is 'int4'; expected one of 'float32', 'bfloat16', 'int8'"):
        prepare_for_inference(model, "int4")
    with pytest.raises(ValueError, match="linear_dtype is 'fp8'"):
        prepare_for_inference(model, "int8", "fp8")
    with pytest.raises(ValueError, match="a Linear holds no FastBERT model"):
        prepare_for_inference(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="this version knows"):
        FastBertQuantizationConfig("int8", group_size=32)
    model.layers[0].attention.query = torch.nn.Sequential(model.layers[0].attention.query)
    with pytest.raises(ValueError, match=r"layers.0.attention.query is a Sequential; expected torch.nn.Linear"):
        prepare_for_inference(model)
    assert not model.is_prepared


def test_a_tensor_that_a_prepared_folder_lacks_is_an_error(tmp_path):
    prepared(tiny_model(FastBertModel, **LEAVES), "int8").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("layers.1.attention.key.weight_scale")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.key\.weight_scale"):
        FastBertModel.from_pretrained(tmp_path)


def test_what_is_slow_here_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr(inference_fastbert, "bfloat16_products", lambda: False)
    monkeypatch.setattr(inference_fastbert.logger, "propagate", True)
    inference_fastbert.logger.warning_once.cache_clear()
    model = wide_model(FastBertModel, **LEAVES)
    with caplog.at_level(logging.WARNING), fastbert_hf.use_backend("reference"):
        slow = [prepared(model, types) for types in ("int8", "int8", "int8 and bfloat16")]
        found = [output(each, random_batch(3, 9)) for each in slow]
    messages = [record.message for record in caplog.records]
    assert sum("no compiled kernel of the op linear_int8" in message for message in messages) == 1
    assert sum("no compiled kernel of the op leaf_trees_int8" in message for message in messages) == 1
    assert sum("rounded weights compute in float32" in message for message in messages) == 1
    assert slow[2].layers[0].attention.output.weight.dtype == torch.float32
    expected = output(model, random_batch(3, 9))
    for given in found:
        assert (given - expected).norm() <= ERROR["int8"] * expected.norm()


@torch.no_grad()
def test_a_pipeline_opens_a_prepared_folder(saved, tokenizer):
    model = prepared(tiny_model(FastBertForSequenceClassification, num_labels=3, **LEAVES), "int8")
    classify = pipeline("text-classification", model=saved(model), top_k=None)
    answers = classify(WORDS[:1])[0]
    assert type(classify.model.base_model.layers[0].ffn) is QuantizedLeafFeedForward
    expected = model(**tokenizer(WORDS[0], return_tensors="pt")).logits.softmax(-1)[0]
    assert [answer["score"] for answer in answers] == pytest.approx(expected.sort(descending=True).values.tolist())


def test_an_embedder_is_prepared_in_place_saved_and_loaded(saved, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    embedder = sentence_transformers.SentenceTransformer(saved(tiny_model(FastBertModel, **LEAVES)), device="cpu")
    before = embedder.encode(WORDS, convert_to_tensor=True)
    assert prepare_for_inference(embedder, "int8") is embedder
    expected = embedder.encode(WORDS, convert_to_tensor=True)
    assert type(embedder[0].auto_model.layers[0]) is FusedLayer
    assert not torch.equal(expected, before)
    assert torch.nn.functional.cosine_similarity(expected, before).min() > 0.9
    embedder.save(str(tmp_path / "embedder"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "embedder"), device="cpu")
    assert torch.equal(again.encode(WORDS, convert_to_tensor=True), expected)


LOAD = """
import torch, transformers
saved = torch.load("saved.pt")
for name, expected in saved["outputs"].items():
    model = transformers.AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        given = model(**saved["inputs"]).logits
    assert type(model.base_model.layers[0]).__name__ == "FusedLayer", name
    torch.testing.assert_close(given, expected, rtol=1e-2, atol=1e-2)
    print(name, model.config.quantization_config.dtype)
"""


def test_a_prepared_folder_carries_its_code(tmp_path):
    model = wide_model(FastBertForSequenceClassification, **LEAVES)
    outputs, inputs = {}, random_batch(3, 9)
    with fastbert_hf.use_backend("reference"):
        for types in ("float32", "bfloat16", "int8"):
            each = prepared(model, types)
            each.save_pretrained(tmp_path / types)
            outputs[types] = output(each, inputs)
    torch.save({"inputs": inputs, "outputs": outputs}, tmp_path / "saved.pt")
    printed = run_without_package(LOAD, cwd=Path(tmp_path))
    assert printed.split() == ["float32", "float32", "bfloat16", "bfloat16", "int8", "int8"]


@torch.no_grad()
def test_code_from_a_folder_and_the_package_prepare_each_their_own(tmp_path):
    """One process with two copies of the code: the first copy registered the method with Transformers."""
    model = tiny_model(FastBertForSequenceClassification, **LEAVES)
    prepared(model, "int8").save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(again, FastBertForSequenceClassification)
    foreign = get_class_from_dynamic_module(
        "modeling_fastbert.FastBertForSequenceClassification", str(tmp_path), trust_remote_code=True
    )
    assert foreign is not FastBertForSequenceClassification
    other = foreign.from_pretrained(tmp_path)
    assert type(other.base_model.layers[0]).__module__.startswith("transformers_modules")
    inputs = random_batch(3, 9)
    assert torch.equal(output(other, inputs), output(again, inputs))
