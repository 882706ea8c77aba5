"""The model and its heads."""

import inspect
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from fastbert_hf import FastBertConfig, FastBertForMaskedLM, FastBertForSequenceClassification, FastBertModel

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "fff_depth": 3,
    "fff_trees": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
    "classifier_head_dim": 20,
}
BERT_GEOMETRY = {
    "norm_scheme": "post",
    "use_bias": True,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
    "final_norm": False,
    "mlm_head_transform": True,
    "decoder_bias": True,
    "classifier_head_dim": 32,
}
LEAF_TREES = {"fff_leaf_width": 5}
HEADS = [
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMultipleChoice,
]


def build(auto_class=AutoModelForMaskedLM, seed=0, **fields):
    torch.manual_seed(seed)
    return auto_class.from_config(FastBertConfig(**(SIZES | fields))).eval()


def batch(auto_class=AutoModelForMaskedLM, rows=3, tokens=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 2, tokens) if auto_class is AutoModelForMultipleChoice else (rows, tokens)
    ids = torch.randint(1, 61, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[1, ..., 7:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if auto_class is AutoModelForMaskedLM:
        inputs["labels"] = torch.where(torch.rand(shape, generator=generator) < 0.3, ids, -100)
    elif auto_class is AutoModelForTokenClassification:
        inputs["labels"] = ids % 2
    elif auto_class in (AutoModelForSequenceClassification, AutoModelForMultipleChoice):
        inputs["labels"] = torch.arange(rows) % 2
    elif auto_class is AutoModelForQuestionAnswering:
        inputs |= {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 1}
    return inputs


@pytest.mark.parametrize(
    "geometry",
    [{}, BERT_GEOMETRY, {"ffn_type": "dense"}, LEAF_TREES],
    ids=["crammed", "bert", "dense", "leaves"],
)
@pytest.mark.parametrize("auto_class", HEADS)
def test_every_class_is_registered_trains_saves_and_loads(tmp_path, auto_class, geometry):
    model = build(auto_class, **geometry)
    inputs = batch(auto_class)
    model.train()
    outputs = model(**inputs)
    (outputs.last_hidden_state.sum() if auto_class is AutoModel else outputs.loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        for a, b in zip(model(**inputs).to_tuple(), again(**inputs).to_tuple()):
            # not torch.equal: a vector product's rounding may depend on where loaded weights lie in memory
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("geometry", [{}, BERT_GEOMETRY])
def test_eager_and_sdpa_attention_agree_and_weights_are_returned(geometry):
    model = build(**geometry)
    inputs = batch()
    sdpa = model(**inputs, output_hidden_states=True)
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True)
    torch.testing.assert_close(eager.logits, sdpa.logits, atol=2e-5, rtol=1e-5)
    assert [tuple(w.shape) for w in eager.attentions] == [(3, 4, 12, 12)] * 2
    visible = inputs["attention_mask"][:, None, None].bool()
    assert all((w.masked_fill(visible, 0) == 0).all() for w in eager.attentions)
    torch.testing.assert_close(eager.attentions[0].sum(-1), torch.ones(3, 4, 12))
    assert [tuple(h.shape) for h in sdpa.hidden_states] == [(3, 12, 32)] * 3
    assert isinstance(model(**inputs, return_dict=False), tuple)


@pytest.mark.parametrize("geometry", [{}, LEAF_TREES], ids=["nodes", "leaves"])
def test_gradient_checkpointing_gives_the_same_gradients(geometry):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_dropout_prob": 0.0}
    model = build(**no_dropout, **geometry).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(**batch()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_sparse_prediction_gives_the_loss_of_full_prediction():
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_dropout_prob": 0.0}
    model = build(sparse_prediction=0.25, **dropout)
    inputs = batch()
    labelled = int((inputs["labels"] != -100).sum())
    full = model(**inputs)
    assert full.logits.shape == (3, 12, 61)
    model.train()
    sparse = model(**inputs)
    assert sparse.logits.shape == (labelled, 61)
    torch.testing.assert_close(sparse.loss, full.loss)
    # Trainer hands over the number of labels of the whole accumulated batch
    for items in (50, torch.tensor(50)):
        scaled = model(**inputs, num_items_in_batch=items).loss
        torch.testing.assert_close(scaled, full.loss * labelled / 50)
    model.config.sparse_prediction = 0.0
    assert model(**inputs).logits.shape == (3, 12, 61)


def test_the_decoder_is_tied_through_training_and_resizing():
    model = build()
    embedding = model.get_input_embeddings()
    assert model.get_output_embeddings().weight is embedding.weight
    before = model(**batch()).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model.get_output_embeddings().weight.shape == (70, 32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    after = model(**batch()).logits
    torch.testing.assert_close(after[..., :61], before)
    assert model.get_input_embeddings().padding_idx == 0
    model.resize_token_embeddings(61)
    torch.testing.assert_close(model(**batch()).logits, before)
    biased = build(decoder_bias=True)
    biased.resize_token_embeddings(64)
    assert biased.get_output_embeddings().bias.shape == (64,) and biased(**batch()).logits.shape[-1] == 64


def test_token_types_are_ignored_where_there_are_none():
    inputs = batch()
    types = torch.ones_like(inputs["input_ids"])
    without, with_types = build(), build(**BERT_GEOMETRY)
    assert torch.equal(without(**inputs, token_type_ids=types).logits, without(**inputs).logits)
    assert not torch.equal(with_types(**inputs, token_type_ids=types).logits, with_types(**inputs).logits)
    zeros = torch.zeros_like(types)
    assert torch.equal(with_types(**inputs, token_type_ids=zeros).logits, with_types(**inputs).logits)


@pytest.mark.parametrize("geometry", [{}, BERT_GEOMETRY])
def test_embeddings_and_positions_can_be_given(geometry):
    model = build(**geometry)
    inputs = batch()
    expected = model(**inputs).logits
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, expected)
    positions = torch.arange(12)
    assert torch.equal(model(ids, position_ids=positions, **inputs).logits, expected)
    shifted = model(ids, position_ids=positions.expand(3, -1) + 1, **inputs).logits
    assert not torch.allclose(shifted, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeds)


@pytest.mark.parametrize("geometry", [{}, BERT_GEOMETRY])
def test_too_long_sequences_raise_a_value_error(geometry):
    with pytest.raises(ValueError, match=r"17 tokens; this model has positions for 16 \(max_position_embeddings\)"):
        build(**geometry)(torch.ones(1, 17).long())


@pytest.mark.parametrize("pooling", ["cls", "mean", "mean_all", "max", "lse"])
def test_pooling_sees_padding_only_where_it_says_so(pooling):
    model = build(AutoModelForSequenceClassification, classifier_pooling=pooling)
    inputs = batch(AutoModelForSequenceClassification)
    padded = model(**inputs).logits[1]
    alone = {"input_ids": inputs["input_ids"][1:2, :7], "attention_mask": inputs["attention_mask"][1:2, :7]}
    same = torch.allclose(model(**alone).logits[0], padded, atol=1e-5)
    assert same == (pooling in ("cls", "mean"))


def test_mean_pooling_ignores_what_padding_holds():
    model = build(AutoModelForSequenceClassification, classifier_pooling="mean")
    pooled = model.pooler(torch.full((1, 3, 32), 1.0), torch.tensor([[1, 1, 0]]))
    poisoned = torch.full((1, 3, 32), 1.0)
    poisoned[0, 2] = float("nan")
    assert torch.equal(model.pooler(poisoned, torch.tensor([[1, 1, 0]])), pooled)
    with pytest.raises(ValueError, match=r"needs an attention_mask \(B, T\)"):
        model(torch.ones(1, 3).long(), torch.ones(1, 3, 3))


def test_classification_losses_by_label_type():
    inputs = batch(AutoModelForSequenceClassification)
    inputs.pop("labels")
    regression = build(AutoModelForSequenceClassification, num_labels=1)
    targets = torch.tensor([0.5, 1.0, 2.0])
    outputs = regression(**inputs, labels=targets)
    torch.testing.assert_close(outputs.loss, (outputs.logits[:, 0] - targets).square().mean())
    multi = build(AutoModelForSequenceClassification, num_labels=3)
    outputs = multi(**inputs, labels=torch.eye(3))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, torch.eye(3))
    torch.testing.assert_close(outputs.loss, expected)


def test_padding_receives_no_gradient_from_the_input_side():
    model = build(AutoModel)
    model(**batch() | {"labels": None}).last_hidden_state.sum().backward()
    gradient = model.embeddings.word_embeddings.weight.grad
    assert (gradient[0] == 0).all() and (gradient[1:] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", [{}, BERT_GEOMETRY, LEAF_TREES])
def test_the_whole_model_runs_in_half_precision(tmp_path, dtype, geometry):
    build(**geometry).save_pretrained(tmp_path)
    model = FastBertForMaskedLM.from_pretrained(tmp_path, dtype=dtype).train()
    outputs = model(**batch())
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype and outputs.loss.isfinite()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_positions_survive_loading_in_any_dtype(tmp_path):
    """The sinusoids are not stored: they are computed in float32 and rounded once."""
    build().save_pretrained(tmp_path)
    exact = build().fastbert.embeddings.positions
    assert "fastbert.embeddings.positions" not in load_file(tmp_path / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = FastBertForMaskedLM.from_pretrained(tmp_path, dtype=dtype).fastbert.embeddings.positions
        assert torch.equal(loaded.to(dtype), exact.to(dtype))


def bert_names(prefix: str) -> dict[str, str]:
    """Regular expressions from BERT's tensor names to ours, as `key_mapping` takes them."""
    return {
        r"^bert\.embeddings\.LayerNorm": f"{prefix}embeddings.norm",
        r"^bert\.embeddings": f"{prefix}embeddings",
        r"^bert\.encoder\.layer\.(\d+)\.attention\.self": rf"{prefix}layers.\1.attention",
        r"^bert\.encoder\.layer\.(\d+)\.attention\.output\.dense": rf"{prefix}layers.\1.attention.output",
        r"^bert\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm": rf"{prefix}layers.\1.attention_norm",
        r"^bert\.encoder\.layer\.(\d+)\.intermediate\.dense": rf"{prefix}layers.\1.ffn.dense_in",
        r"^bert\.encoder\.layer\.(\d+)\.output\.dense": rf"{prefix}layers.\1.ffn.dense_out",
        r"^bert\.encoder\.layer\.(\d+)\.output\.LayerNorm": rf"{prefix}layers.\1.ffn_norm",
        r"^bert\.pooler": "pooler",
        r"^cls\.predictions\.transform\.LayerNorm": "mlm_head.norm",
        r"^cls\.predictions\.transform": "mlm_head",
        r"^cls\.predictions\.bias": "mlm_head.decoder.bias",
        r"^cls\.predictions\.decoder": "mlm_head.decoder",
    }


@pytest.mark.parametrize(
    ("bert_class", "our_class"),
    [(BertForMaskedLM, FastBertForMaskedLM), (BertForSequenceClassification, FastBertForSequenceClassification)],
)
def test_the_bert_geometry_with_dense_blocks_is_bert(bert_class, our_class):
    torch.manual_seed(0)
    shared = {key: SIZES[key] for key in list(SIZES)[:5]} | {"intermediate_size": 24, "initializer_range": 0.2}
    bert = bert_class(BertConfig(**shared, type_vocab_size=2)).eval()
    ours = our_class(FastBertConfig(**(SIZES | BERT_GEOMETRY), ffn_type="dense")).eval()
    tensors = {}
    for key, value in bert.state_dict().items():
        for pattern, name in bert_names("fastbert.").items():
            key = re.sub(pattern, name, key)
        tensors[key] = value
    ours.load_state_dict(tensors)
    inputs = batch() | {"token_type_ids": torch.arange(12).expand(3, -1) % 2}
    inputs.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, bert(**inputs).logits, atol=2e-6, rtol=1e-5)


def test_checkpoints_with_missing_or_extra_tensors_are_refused(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    key = "fastbert.layers.1.ffn.weight_in"
    save_file({k: v for k, v in tensors.items() if k != key}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 missing .*{key}"):
        FastBertForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 missing .*layers\.1\.ffn\.weight_in"):
        AutoModel.from_pretrained(tmp_path)
    save_file(tensors | {"fastbert.layers.7.extra": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected .*fastbert\.layers\.7\.extra"):
        FastBertForMaskedLM.from_pretrained(tmp_path)
    save_file(tensors | {key: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key} is \(3, 3\), expected \(30, 32\)"):
        FastBertForMaskedLM.from_pretrained(tmp_path)
    save_file(tensors, path, metadata={"format": "pt"})
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path), FastBertForSequenceClassification)
    assert isinstance(AutoModel.from_pretrained(tmp_path), FastBertModel)


def test_a_classifier_of_another_size_is_replaced_only_on_request(tmp_path):
    build(AutoModelForSequenceClassification, num_labels=3).save_pretrained(tmp_path)
    # Transformers raises a RuntimeError where shapes differ, this project a ValueError for every wrong value
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=r"classifier.weight is \(3, 20\), expected \(5, 20\)"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (5, 20) and model.classifier.weight.isfinite().all()


@pytest.mark.parametrize("auto_class", HEADS)
def test_keyword_arguments_of_forward_are_those_of_the_library(auto_class):
    """Its tools read the annotation to learn what may be passed on."""
    parameter = inspect.signature(build(auto_class).forward).parameters["kwargs"]
    assert parameter.annotation == Unpack[TransformersKwargs]


def test_multiple_choice_wants_a_choice_dimension():
    with pytest.raises(ValueError, match=r"expected input_ids \(B, choices, T\)"):
        build(AutoModelForMultipleChoice)(torch.ones(2, 5).long())
