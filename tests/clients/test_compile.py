"""torch.compile(fullgraph=True): the numbers of eager, and no new graph for every batch shape."""

import os
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastbert_hf import (
    FastBertForMaskedLM,
    FastBertForSequenceClassification,
    FastBertModel,
    FastFeedForward,
)
from tests.clients.helpers import FORMS, random_batch, tiny_model

SHAPES = ((3, 8), (5, 12), (2, 16))  # the first is compiled as it is, the second for any shape, the third by neither
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
SPARSE = {**NO_DROPOUT, "num_hidden_layers": 1, "sparse_prediction": 0.25}
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
NEEDS_INDUCTOR = [pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="inductor needs a C++ compiler")]
INDUCTOR = pytest.param("inductor", marks=NEEDS_INDUCTOR)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def dynamic_from_the_start(backend: str) -> bool | None:
    """Inductor's C++ takes long to compile: one graph for any shape, without the one for the first shape alone."""
    return True if backend == "inductor" else None


def masked_lm_batch(batch: int, length: int) -> dict[str, torch.Tensor]:
    """One label in every sequence, and two in the second: fewer than a quarter of the positions."""
    inputs = random_batch(batch, length)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 1] = inputs["input_ids"][:, 1]
    labels[1, -1] = 7
    return {**inputs, "labels": labels}


def classification_batch(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {**random_batch(batch, length), "labels": torch.arange(batch) % 2}


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert given.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            given[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@torch.no_grad()
def test_compiled_encoder_equals_eager_at_every_shape(backend):
    model = tiny_model(FastBertModel, num_hidden_layers=1)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic_from_the_start(backend))
    for shape in SHAPES:
        inputs = random_batch(*shape)
        given, expected = compiled(**inputs), model(**inputs)
        torch.testing.assert_close(given.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "batch", "backend"),
    [
        (FastBertForMaskedLM, masked_lm_batch, "aot_eager"),
        pytest.param(FastBertForMaskedLM, masked_lm_batch, "inductor", marks=NEEDS_INDUCTOR),
        (FastBertForSequenceClassification, classification_batch, "aot_eager"),
    ],
)
def test_compiled_training_step_has_the_loss_and_gradients_of_eager(model_class, batch, backend):
    model = tiny_model(model_class, **SPARSE).train()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic_from_the_start(backend))
    for shape in SHAPES:
        inputs = batch(*shape)
        expected = model(**inputs).loss
        given = compiled(**inputs).loss
        torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)
        assert_same_gradients(gradients(model, given), gradients(model, expected))
    assert counter.frame_count <= 2


def test_compiled_sparse_prediction_keeps_its_quota_of_rows_and_refuses_more_labels():
    model = tiny_model(FastBertForMaskedLM, **SPARSE).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = masked_lm_batch(4, 8)
    outputs = compiled(**inputs)
    assert outputs.logits.shape == (8, model.config.vocab_size)  # a quarter of 32 positions, five of them labelled
    inputs["labels"] = inputs["input_ids"]  # every position is labelled
    with pytest.raises(RuntimeError, match="raise sparse_prediction"):
        compiled(**inputs)


def test_the_default_configuration_compiles_for_any_number_of_labels():
    """The library's collator masks a random number of positions: no quota may stand in its way."""
    model = tiny_model(FastBertForMaskedLM, **NO_DROPOUT, num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = random_batch(4, 8)
    for labelled in (0.25, 0.5, 1.0):
        drawn = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < labelled
        labels = inputs["input_ids"].masked_fill(~drawn, -100)
        torch.testing.assert_close(compiled(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_step_with_gradient_checkpointing_has_the_gradients_of_eager(form):
    model = tiny_model(FastBertForMaskedLM, **SPARSE, **FORMS[form]).train()
    inputs = masked_lm_batch(3, 8)
    expected = gradients(model, model(**inputs).loss)
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(model, compiled(**inputs).loss), expected)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_compiled_layer_under_autocast_equals_eager(backend):
    torch.manual_seed(0)
    layer = FastFeedForward(32, 16, depth=3, trees=2, initializer_range=0.2)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for rows in (5, 9):
        x = torch.randn(rows, 32)
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = run(leaf)
            y.float().square().sum().backward()
            results.append([y, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
        assert results[0][0].dtype == torch.bfloat16
        for given, expected in zip(results[1], results[0], strict=True):
            assert given.dtype == expected.dtype
            torch.testing.assert_close(given, expected)


@torch.no_grad()
def test_compiled_layer_alone_equals_eager_without_gradients():
    torch.manual_seed(0)
    layer = FastFeedForward(32, 16, depth=3, trees=2, initializer_range=0.2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for shape in ((5, 32), (2, 3, 32), (0, 32)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
