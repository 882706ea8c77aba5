"""Which weights of a classifier are trained."""

import pytest

from fastbert_hf import FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.training.glue.classifier import ModelArguments, restrict_training

FORMS = {"published form": {}, "leaf trees": {"fff_leaf_width": 4}}


def classifier(**fields):
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "fff_depth": 2}
    return FastBertForSequenceClassification(FastBertConfig(**sizes, **fields))


@pytest.mark.parametrize("form", FORMS)
def test_trees_of_either_form_are_frozen(form):
    model = restrict_training(classifier(**FORMS[form]), ModelArguments(freeze_trees=True))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".ffn." in name}


@pytest.mark.parametrize("form", FORMS)
def test_trees_of_either_form_take_adapters(form):
    model = restrict_training(classifier(**FORMS[form]), ModelArguments(lora_rank=2, lora_trees=True))
    adapted = [name for name, parameter in model.named_parameters() if ".ffn." in name and parameter.requires_grad]
    assert adapted and all("lora" in name for name in adapted)
