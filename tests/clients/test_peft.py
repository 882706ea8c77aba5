"""PEFT: LoRA on attention and on the trees' parameters, which belong to no nn.Linear."""

import copy
import warnings

import pytest
import torch

from fastbert_hf import FastBertForMaskedLM, FastBertForSequenceClassification
from tests.clients.helpers import FORMS, random_batch, tiny_model

peft = pytest.importorskip("peft")

RANK = 4
ATTENTION = {"target_modules": ["query", "value"]}
TREES = {"target_parameters": ["ffn.weight_in", "ffn.weight_out"]}
LEAVES = {"target_parameters": ["ffn.router", "ffn.weight_in", "ffn.weight_out"]}
BOTH = {**ATTENTION, **TREES}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def adapted(model: torch.nn.Module, targets: dict) -> torch.nn.Module:
    """A copy of the model with an adapter; the model itself stays as it is."""
    config = peft.LoraConfig(r=RANK, lora_alpha=8, **({"target_modules": []} | targets))
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(model), config)


def masked_lm_batch() -> dict[str, torch.Tensor]:
    inputs = random_batch(3, 8)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def trained(model: torch.nn.Module, steps: int = 3) -> list[float]:
    """Losses of a few optimiser steps on one batch; the model ends in evaluation mode."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**masked_lm_batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(**random_batch(3, 8)).logits


@pytest.mark.parametrize(
    ("targets", "form"),
    [(ATTENTION, "nodes"), (TREES, "nodes"), (BOTH, "nodes"), ({**ATTENTION, **LEAVES}, "leaves")],
    ids=["attention", "trees", "both", "leaves"],
)
def test_adapter_starts_as_the_model_trains_merges_and_loads_again(targets, form, tmp_path):
    base = tiny_model(FastBertForMaskedLM, **NO_DROPOUT, **FORMS[form])
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(base, targets).eval()
    assert torch.equal(logits(model), logits(base)), "lora_B starts at zero"

    losses = trained(model)
    assert losses[-1] < losses[0]
    changed = logits(model)
    assert (changed - logits(base)).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again), changed)

    merged = model.merge_and_unload()
    assert type(merged) is FastBertForMaskedLM
    assert merged.state_dict().keys() == frozen.keys()
    torch.testing.assert_close(logits(merged), changed, rtol=1e-5, atol=1e-5)
    touched = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, frozen[name])}
    layers = [f"fastbert.layers.{index}." for index in range(2)]
    names = {"target_modules": ("attention.query.weight", "attention.value.weight")}
    names["target_parameters"] = tuple(targets.get("target_parameters", ()))
    assert touched == {layer + name for layer in layers for kind in targets for name in names[kind]}


def test_tree_adapters_have_a_row_a_node_and_only_visited_nodes_receive_gradient():
    base = tiny_model(FastBertForMaskedLM, **NO_DROPOUT)
    model = adapted(base, TREES).train()
    ffn = base.fastbert.layers[0].ffn
    outer = model.base_model.model.fastbert.layers[0].ffn
    wrappers = {outer.parameter_name: outer, outer.base_layer.parameter_name: outer.base_layer}
    assert wrappers.keys() == {"weight_in", "weight_out"}

    model(**masked_lm_batch()).loss.backward()
    hidden = []
    base.fastbert.layers[0].ffn.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0].detach()))
    inputs = random_batch(3, 8)
    base(**inputs)
    nodes = ffn.route(hidden[0])[inputs["attention_mask"].bool()]  # padding is seen by no label: (tokens, P, D+1)
    nodes = nodes + torch.arange(ffn.trees).unsqueeze(-1) * (ffn.neurons // ffn.trees)
    visited = torch.zeros(ffn.neurons, dtype=torch.bool)
    visited[nodes.flatten()] = True
    assert 0 < visited.sum() < ffn.neurons
    for wrapper in wrappers.values():
        assert wrapper.lora_A["default"].weight.shape == (RANK, ffn.in_features)
        gradient = wrapper.lora_B["default"].weight.grad  # (P*n, rank)
        assert gradient.shape == (ffn.neurons, RANK)
        assert torch.equal(gradient.abs().sum(1) > 0, visited)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


def test_tree_adapters_train_with_gradient_checkpointing():
    base = tiny_model(FastBertForMaskedLM, **NO_DROPOUT)
    gradients = []
    for checkpointing in (False, True):
        model = adapted(base, BOTH).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(**masked_lm_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-6, atol=1e-7)


def test_task_type_keeps_the_new_classifier_with_the_adapter(tmp_path):
    base = tiny_model(FastBertForSequenceClassification, num_labels=3, **NO_DROPOUT)
    model = adapted(base, {**BOTH, "task_type": "SEQ_CLS"})
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**random_batch(3, 8), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    model.eval()
    classifier = model.base_model.model.classifier.modules_to_save["default"].weight
    assert not torch.equal(classifier, base.classifier.weight)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def untied(model: torch.nn.Module) -> torch.nn.Module:
    """As the warning says."""
    model.config.tie_word_embeddings = False
    model.mlm_head.decoder.weight = torch.nn.Parameter(model.mlm_head.decoder.weight.detach().clone())
    return model


@pytest.mark.parametrize("name", ["decoder", "word_embeddings"])
def test_an_adapter_at_one_end_of_the_tied_weight_is_warned_of_until_it_is_untied(name, tmp_path):
    random = {"target_modules": [name], "init_lora_weights": False}
    with pytest.warns(UserWarning, match=f"the weight of {name} is tied and an adapter was put on it"):
        model = adapted(tiny_model(FastBertForMaskedLM), random).eval()
    expected = logits(model)
    assert (logits(model.merge_and_unload()) - expected).abs().max() > 0.1, "what the warning warns of"

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the weight of")
        model = adapted(untied(tiny_model(FastBertForMaskedLM)), random).eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(FastBertForMaskedLM.from_pretrained(tmp_path).eval()), logits(merged))


def test_other_adapters_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the weight of")
        adapted(tiny_model(FastBertForMaskedLM), {"target_modules": "all-linear"})
        adapted(tiny_model(FastBertForSequenceClassification), {"target_modules": ["word_embeddings"]})
        tokens = peft.TrainableTokensConfig(token_indices=[1], target_modules=["word_embeddings"])
        peft.get_peft_model(tiny_model(FastBertForMaskedLM), tokens)
